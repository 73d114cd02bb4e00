"""What a sweep has spent, what each trial that runs has taken so far, and whether that was all it may."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from tigerbot.spec import SweepSpec
from tigerbot_jobs.sweep.course import Course


class Purse:
    """Counts over the lives of all drivers: what the journal tells, and what runs now.

    Args:
        now: the clock.

    Attributes:
        cards: that a trial takes.
    """

    def __init__(self, spec: SweepSpec, course: Course, now: Callable[[], float] = time.monotonic) -> None:
        self._budget, self._course, self._now = spec.budget, course, now
        self._deadline_s = math.inf if spec.deadline_s is None else spec.deadline_s
        self.cards = spec.gpus_per_trial or spec.cpus_per_trial
        self._opened = self._now()
        self._before_s: float | None = None
        self._began: dict[str, float] = {}  # of what runs

    def begin(self, trial: str) -> None:
        self._began[trial] = self._now()

    def end(self, trial: str) -> float:
        """Seconds since it began."""
        return self._now() - self._began.pop(trial)

    def is_overdue(self, trial: str) -> bool:
        return trial in self._began and self._now() - self._began[trial] > self._deadline_s

    def spent(self) -> str:
        """What is used up, in words; nothing while there is something left of everything."""
        if self._before_s is None:
            self._before_s = self._course.wall_s
        budget, now = self._budget, self._now()
        hours = (self._before_s + now - self._opened) / 3600
        running_s = sum(now - began for began in self._began.values())
        card_hours = self._course.card_hours + running_s * self.cards / 3600
        if budget.hours is not None and hours >= budget.hours:
            return f"{budget.hours:g} hours"
        if budget.card_hours is not None and card_hours >= budget.card_hours:
            return f"{budget.card_hours:g} card-hours"
        if budget.money is not None and card_hours * (budget.price_per_card_hour or 0) >= budget.money:
            return f"{budget.money:g} of money at {budget.price_per_card_hour:g} a card-hour"
        return ""

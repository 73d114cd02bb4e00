"""What a sweep has spent, and whether that was all it may."""

from __future__ import annotations

import time

from tigerbot.spec import SweepSpec
from tigerbot_jobs.sweep.course import Course


class Purse:
    """Counts over the lives of all drivers: what the journal tells, and what runs now."""

    def __init__(self, spec: SweepSpec, course: Course) -> None:
        self._budget, self._course = spec.budget, course
        self._began = time.monotonic()
        self._before_s: float | None = None

    def spent(self, running_card_s: float) -> str:
        """What is used up, in words; nothing while there is something left of everything."""
        if self._before_s is None:
            self._before_s = self._course.wall_s
        budget = self._budget
        hours = (self._before_s + time.monotonic() - self._began) / 3600
        card_hours = self._course.card_hours + running_card_s / 3600
        if budget.hours is not None and hours >= budget.hours:
            return f"{budget.hours:g} hours"
        if budget.card_hours is not None and card_hours >= budget.card_hours:
            return f"{budget.card_hours:g} card-hours"
        if budget.money is not None and card_hours * (budget.price_per_card_hour or 0) >= budget.money:
            return f"{budget.money:g} of money at {budget.price_per_card_hour:g} a card-hour"
        return ""

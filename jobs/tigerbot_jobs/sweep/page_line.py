"""How a sweep goes, in one line for a terminal: trials, rate, best, time and money left.

A `Tally` is told the events of the journal, each once, by the driver that writes them or by whoever reads them later;
`line` is a pure function of what it then knows, the limits of the spec and the clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tigerbot_jobs.shown import printable, span

_RECENT = 50  # ends that the rate is taken over


@dataclass(frozen=True)
class Limits:
    """What the spec allows, all lives of the driver together; None where it says nothing. Hours are of wall time."""

    hours: float | None = None
    card_hours: float | None = None
    money: float | None = None

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Limits:
        """Those of a sweep spec as it is kept in a run's folder."""
        budget = spec.get("budget") or {}
        return cls(budget.get("hours"), budget.get("card_hours"), budget.get("money"))


@dataclass(frozen=True)
class Progress:
    """Where a sweep stands.

    Attributes:
        running: (since when, cards) of each trial that runs.
        best: (value, trial) so far, or None.
        ends: moments of the last ends in this driver's life, which began at `opened`.
        worked_s: wall time of the drivers before this one, each up to the last thing it wrote.
        card_s: card-seconds of attempts that are over.
    """

    metric: str
    planned: int
    ended: int
    failed: int
    running: tuple[tuple[float, float], ...]
    best: tuple[float, str] | None
    ends: tuple[float, ...]
    opened: float
    worked_s: float
    card_s: float
    price: float | None

    @property
    def per_minute(self) -> float | None:
        """Trials that end in a minute, of late; None before two have ended."""
        if len(self.ends) < 2 or self.ends[-1] <= self.ends[0]:
            return None
        return 60 * (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])

    def card_hours(self, now: float) -> float:
        return (self.card_s + sum(max(0.0, now - since) * cards for since, cards in self.running)) / 3600


class Tally:
    """Counts events as they come. One caller at a time."""

    def __init__(self) -> None:
        self._about: Mapping[str, Any] = {}
        self._opened, self._worked_s, self._last = math.nan, 0.0, math.nan
        self._running: dict[str, tuple[float, float]] = {}
        self._fresh: set[str] = set()  # of which none is the search's best
        self._ended: dict[str, bool] = {}
        self._best: tuple[float, str] | None = None
        self._ends: deque[float] = deque(maxlen=_RECENT)
        self._card_s = 0.0

    def take(self, event: Mapping[str, Any]) -> None:
        """One event of the journal, whichever."""
        kind, t = event["event"], float(event["t"])
        if kind == "open":
            if self._about:
                self._worked_s += max(0.0, self._last - self._opened)
            self._about, self._opened = event, t
            self._running.clear()  # they run no more, whoever ran them
            self._ends.clear()
        elif kind == "begin":
            self._give_back(event["name"], t)
            self._running[event["name"]] = t, float(event.get("cards") or 0)
            if event.get("fresh"):
                self._fresh.add(event["name"])
        elif kind == "end":
            self._end(event, t)
        self._last = t

    def progress(self) -> Progress:
        price = self._about.get("price_per_card_hour")
        return Progress(
            metric=str(self._about.get("metric", "metric")),
            planned=max(int(self._about.get("trials") or 0), len(self._ended)),
            ended=len(self._ended),
            failed=sum(self._ended.values()),
            running=tuple(self._running.values()),
            best=self._best,
            ends=tuple(self._ends),
            opened=self._opened,
            worked_s=self._worked_s,
            card_s=self._card_s,
            price=None if price is None else float(price),
        )

    def _end(self, event: Mapping[str, Any], t: float) -> None:
        name, metric = event["name"], event.get("metric")
        _, cards = self._running.pop(name, (t, float(event.get("cards") or 0)))
        self._card_s += float(event.get("seconds") or 0) * cards
        self._ended[name] = event["status"] in ("failed", "killed") and event.get("cause") != "budget"
        self._ends.append(t)
        if event["status"] not in ("done", "stopped") or name in self._fresh:
            return
        if metric is None or not math.isfinite(metric):
            return
        lower = self._about.get("mode", "min") == "min"
        if self._best is None or (metric < self._best[0] if lower else metric > self._best[0]):
            self._best = float(metric), name

    def _give_back(self, name: str, t: float) -> None:
        """A trial that begins again without an end (a takeover, a retry) had its cards until now."""
        if name in self._running:
            since, cards = self._running.pop(name)
            self._card_s += max(0.0, t - since) * cards


def progress(events: Iterable[Mapping[str, Any]]) -> Progress:
    """Where a sweep stands after these events."""
    tally = Tally()
    for event in events:
        tally.take(event)
    return tally.progress()


def line(found: Progress, limits: Limits, now: float) -> str:
    """412/3,000 trials, 21 min 5 s left; 4 running, 3 failed, 12.4/min, best loss 1.234 (trial-0231), 16.80 of 20.00 money left"""
    left = time_left_s(found, limits, now)
    when = "" if left is None else f", {span(max(1.0, round(left)))} left"
    return f"{found.ended:,}/{found.planned:,} trials{when}; {note(found, limits, now)}"


def note(found: Progress, limits: Limits, now: float) -> str:
    """The line without its count and time left, for where a progress bar shows those."""
    parts = [f"{len(found.running)} running"] if found.running else []
    if found.failed:
        parts.append(f"{found.failed:,} failed")
    if found.per_minute is not None:
        parts.append(f"{found.per_minute:.3g}/min")
    if found.best is not None:
        parts.append(printable(f"best {found.metric} {found.best[0]:.5g} ({found.best[1]})"))
    return ", ".join([*parts, *_budget(found, limits, now)])


def time_left_s(found: Progress, limits: Limits, now: float) -> float | None:
    """Until the first of these: all trials at the rate of late, the hours, the card-hours, the money; None if unknown."""
    candidates = []
    rate = found.per_minute
    if rate is not None and found.ended < found.planned:
        candidates.append((found.planned - found.ended) * 60 / rate)
    if limits.hours is not None and math.isfinite(found.opened):
        candidates.append(limits.hours * 3600 - found.worked_s - (now - found.opened))
    cards, spent = sum(cards for _, cards in found.running), found.card_hours(now)
    for allowed in _card_hours_allowed(found, limits):
        if cards:
            candidates.append((allowed - spent) * 3600 / cards)
    return max(0.0, min(candidates)) if candidates else None


def _card_hours_allowed(found: Progress, limits: Limits) -> list[float]:
    allowed = [limits.card_hours] if limits.card_hours is not None else []
    return [*allowed, limits.money / found.price] if limits.money is not None and found.price else allowed


def _budget(found: Progress, limits: Limits, now: float) -> list[str]:
    spent = found.card_hours(now)
    parts = []
    if limits.card_hours is not None:
        parts.append(f"{max(0.0, limits.card_hours - spent):.2f} of {limits.card_hours:g} card-hours left")
    if limits.money is not None and found.price is not None:
        rest, whole = max(0.0, limits.money - spent * found.price), limits.money
        parts.append(f"{_amount(rest, whole)} of {_amount(whole, whole)} money left")
    elif found.price:
        parts.append(f"{_amount(spent * found.price, spent * found.price)} money spent")
    return parts


def _amount(amount: float, whole: float) -> str:
    return f"{amount:,.2f}" if whole >= 1 else f"{amount:.4f}"

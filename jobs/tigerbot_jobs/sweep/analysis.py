"""What happened in a sweep: trials with their attempts, rungs, lineage, curves. `analysis_read.py` reads it.

Nine lines of ten of a journal are points of learning curves, and no ranking needs them: a history holds them unread and
parses them when a picture first asks for `curves`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic_core import from_json

Mode = Literal["min", "max"]
POINT = b'{"event":"point"'  # how the line of a point begins
_AT_ONCE = 5000  # points that are parsed at once: as objects they are thirty times their lines
MISSHAPEN = (AttributeError, KeyError, TypeError, ValueError)  # what reading an event of another shape raises


@dataclass(frozen=True)
class Life:
    """One driver of the sweep, from its `open` on. `price_per_card_hour` is None where nobody gave a price."""

    t: float
    driver: str
    planned: int
    metric: str
    mode: Mode
    searcher: str
    scheduler: str
    price_per_card_hour: float | None


@dataclass(frozen=True)
class Ending:
    """How one attempt of a trial ended. `metric` is None where it reported none."""

    t: float
    status: str
    metric: float | None
    error: str
    cause: str
    seconds: float

    @property
    def broken(self) -> bool:
        """Whether something went wrong; what ended because the budget was spent did not."""
        return self.status in ("failed", "killed") and self.cause != "budget"


@dataclass(frozen=True)
class Trial:
    """One trial with all its attempts.

    Attributes:
        begun: when each attempt began. `reasons` says why: "" the first time and after a driver's death, `takeover` where
            it went on with another member's weights, else the cause its attempt before failed of.
        endings: how those attempts ended that said so.
        params: a member of a population changes its own; these are what it ended with.
        config: the same for every seed of a configuration.
        fresh: it runs one of the best configurations again with another seed; the search did not learn from it.
        running: its last event is a begin; it runs, or its driver died.
    """

    name: str
    params: Mapping[str, Any]
    config: str
    seed: int
    parent: str | None
    cards: float
    node: str
    begun: tuple[float, ...]
    reasons: tuple[str, ...]
    endings: tuple[Ending, ...]
    fresh: bool
    running: bool

    @property
    def status(self) -> str:
        return "running" if self.running or not self.endings else self.endings[-1].status

    @property
    def metric(self) -> float | None:
        """Its last report, where that is a number and the trial did not fail."""
        if self.status not in ("done", "stopped"):
            return None
        value = self.endings[-1].metric
        return value if value is not None and math.isfinite(value) else None

    @property
    def ended_at(self) -> float:
        return self.endings[-1].t if self.endings else math.nan

    @property
    def seconds(self) -> float:
        """Of all attempts that said how they ended."""
        return sum(ending.seconds for ending in self.endings)

    @property
    def card_hours(self) -> float:
        return self.seconds * self.cards / 3600


@dataclass(frozen=True)
class Rung:
    """A trial at a rung of ASHA or HyperBand: what it had there, and whether it was ever let on."""

    name: str
    rung: int
    step: int
    value: float
    promoted: bool


@dataclass(frozen=True)
class Exploit:
    """A member of a population that took over another's weights at a step, and the parameters it went on with."""

    name: str
    source: str
    step: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """The points of a trial by step; `last` holds the other metrics of its last point."""

    steps: np.ndarray
    values: np.ndarray
    times: np.ndarray
    last: Mapping[str, float]


@dataclass(frozen=True)
class History:
    """A sweep up to now. Trials stand in the order in which they first began; `journal` is all they said."""

    lives: tuple[Life, ...]
    trials: Mapping[str, Trial]
    rungs: tuple[Rung, ...]
    exploits: tuple[Exploit, ...]
    unreadable: int
    journal: bytes = field(repr=False, default=b"")

    @property
    def metric(self) -> str:
        return self.lives[-1].metric if self.lives else "metric"

    @property
    def mode(self) -> Mode:
        return self.lives[-1].mode if self.lives else "min"

    @property
    def price(self) -> float | None:
        return self.lives[-1].price_per_card_hour if self.lives else None

    @property
    def planned(self) -> int:
        return max((life.planned for life in self.lives), default=0) or len(self.trials)

    @cached_property
    def searched(self) -> tuple[Trial, ...]:
        """Trials of the search itself that have a metric, in the order in which they ended."""
        found = [trial for trial in self.trials.values() if not trial.fresh and trial.metric is not None]
        return tuple(sorted(found, key=lambda trial: trial.ended_at))

    def better(self, first: float, second: float) -> bool:
        return first < second if self.mode == "min" else first > second

    def key(self, value: float | None) -> float:
        """What sorts best first; None last."""
        if value is None or math.isnan(value):
            return math.inf
        return value if self.mode == "min" else -value

    def best(self, count: int) -> list[Trial]:
        """The best trials of the search, best first."""
        return sorted(self.searched, key=lambda trial: self.key(trial.metric))[:count]

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """Points of every trial. The first point of a step stands; one that is no number is left out."""
        rows: dict[str, dict[int, tuple[float, float]]] = {}
        last: dict[str, tuple[int, Mapping[str, float]]] = {}
        lines = [line for line in self.journal.split(b"\n") if line.startswith(POINT)]
        for start in range(0, len(lines), _AT_ONCE):
            for event in parsed(lines[start : start + _AT_ONCE])[0]:
                try:
                    name, step = event["name"], int(event["step"])
                    value, t = float(event["value"]), float(event["t"])
                    if math.isfinite(value) and step not in rows.setdefault(name, {}):
                        rows[name][step] = value, t
                        if name not in last or step > last[name][0]:
                            last[name] = step, event.get("metrics") or {}
                except MISSHAPEN:
                    continue
        return {name: _curve(points, last[name][1]) for name, points in rows.items()}


def parsed(lines: Sequence[bytes]) -> tuple[list[Any], int]:
    """The lines as values, in one call of a fast parser; one by one only where some line is no JSON."""
    try:
        return from_json(b"[" + b",".join(lines) + b"]"), 0
    except ValueError:
        pass
    found: list[Any] = []
    for line in lines:
        try:
            found.append(from_json(line))
        except ValueError:
            continue
    return found, len(lines) - len(found)


def _curve(points: Mapping[int, tuple[float, float]], last: Mapping[str, float]) -> Curve:
    steps = sorted(points)
    return Curve(
        np.array(steps), np.array([points[s][0] for s in steps]), np.array([points[s][1] for s in steps]), last
    )

"""What happened in a sweep, read from its journal: trials with their attempts, rungs, lineage, curves.

The journal (`trials.jsonl`) holds one event a line, written by whichever driver was alive. Nine lines of ten are points
of learning curves, and no ranking needs them: `read_history` sets them aside unread, and `History.curves` reads them when
a picture first asks. So the 100 best of 3,000 trials are known before the points would have been parsed. What is not
JSON, names no trial or has another shape is counted in `unreadable` and left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic_core import from_json

from tigerbot.errors import InputError

Mode = Literal["min", "max"]
_POINT = b'{"event":"point"'
_MISSHAPEN = (AttributeError, KeyError, TypeError, ValueError)


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


@dataclass(frozen=True)
class Trial:
    """One trial with all its attempts: `begun` holds when each began, `endings` how those that ended did.

    Attributes:
        config: the same for every seed of a configuration.
        fresh: it runs a configuration again with another seed than the first, after the search or beside it.
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
    """A sweep up to now. Trials stand in the order in which they first began."""

    lives: tuple[Life, ...]
    trials: Mapping[str, Trial]
    rungs: tuple[Rung, ...]
    exploits: tuple[Exploit, ...]
    unreadable: int
    points: Sequence[bytes] = field(repr=False, default=())

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
        rows: dict[str, dict[int, tuple[float, float, Mapping[str, float]]]] = {}
        for event in _parsed(self.points)[0]:
            try:
                step, value, t = int(event["step"]), float(event["value"]), float(event["t"])
                if math.isfinite(value):
                    rows.setdefault(event["name"], {}).setdefault(step, (value, t, event.get("metrics") or {}))
            except _MISSHAPEN:
                continue
        return {name: _curve(points) for name, points in rows.items()}


def read_history(path: Path) -> History:
    """The history in a journal, also while a driver writes it: half a last line is not there yet.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot be read ({str(error.strerror).lower()})", where=str(path), fix="give a sweep or its trials.jsonl"
        ) from None
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    points = [line for line in lines if line.startswith(_POINT)]
    events, unreadable = _parsed([line for line in lines if not line.startswith(_POINT)])
    fold = _Fold()
    for event in events:
        try:
            fold.take(event)
        except _MISSHAPEN:
            unreadable += 1
    return fold.history(unreadable, points)


class _Fold:
    """Events, one after the other, to a history."""

    def __init__(self) -> None:
        self._lives: list[Life] = []
        self._begins: dict[str, list[Mapping[str, Any]]] = {}
        self._endings: dict[str, list[Ending]] = {}
        self._running: dict[str, bool] = {}
        self._rungs: dict[tuple[str, int], Rung] = {}
        self._exploits: dict[tuple[str, int], Exploit] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "open":
            self._lives.append(_life(event))
        elif kind == "begin":
            name, _ = str(event["name"]), float(event["t"])
            self._begins.setdefault(name, []).append(event)
            self._running[name] = True
        elif kind == "end":
            self._end(event)
        elif kind == "rung":
            place = event["name"], int(event["rung"])
            earlier = self._rungs.get(place)
            promoted = bool(event["promoted"]) or (earlier is not None and earlier.promoted)
            value = earlier.value if earlier else float(event["value"])
            self._rungs[place] = Rung(*place, int(event["step"]), value, promoted)
        elif kind == "exploit":
            step = int(event["step"])
            self._exploits.setdefault(
                (event["name"], step), Exploit(event["name"], event["from"], step, event["before"], event["after"])
            )

    def history(self, unreadable: int, points: Sequence[bytes]) -> History:
        first_seed: dict[str, int] = {}
        trials = {}
        for name, begins in self._begins.items():
            first, last = begins[0], begins[-1]
            config, seed = str(first.get("config") or name), int(first.get("seed") or 0)
            fresh = bool(first.get("fresh", seed != first_seed.setdefault(config, seed)))
            trials[name] = Trial(
                name=name,
                params=first.get("params") or {},
                config=config,
                seed=seed,
                parent=first.get("parent"),
                cards=float(last.get("cards") or 0),
                node=str(last.get("node") or ""),
                begun=tuple(float(begin["t"]) for begin in begins),
                endings=tuple(self._endings.get(name, ())),
                fresh=fresh,
                running=self._running[name],
            )
        return History(
            tuple(self._lives), trials, tuple(self._rungs.values()), tuple(self._exploits.values()), unreadable, points
        )

    def _end(self, event: Mapping[str, Any]) -> None:
        name, metric = event["name"], event.get("metric")
        if name not in self._begins:
            raise ValueError(f"{name} ended and never began")
        ending = Ending(
            t=float(event["t"]),
            status=str(event["status"]),
            metric=None if metric is None else float(metric),
            error=str(event.get("error") or ""),
            cause=str(event.get("cause") or ""),
            seconds=float(event.get("seconds") or 0),
        )
        self._endings.setdefault(name, []).append(ending)
        self._running[name] = False


def _life(event: Mapping[str, Any]) -> Life:
    price = event.get("price_per_card_hour")
    return Life(
        t=float(event["t"]),
        driver=str(event.get("driver") or ""),
        planned=int(event.get("trials") or 0),
        metric=str(event["metric"]),
        mode="max" if event["mode"] == "max" else "min",
        searcher=str(event.get("searcher") or ""),
        scheduler=str(event.get("scheduler") or ""),
        price_per_card_hour=None if price is None else float(price),
    )


def _curve(points: Mapping[int, tuple[float, float, Mapping[str, float]]]) -> Curve:
    steps = sorted(points)
    values, times = [points[step][0] for step in steps], [points[step][1] for step in steps]
    return Curve(np.array(steps), np.array(values), np.array(times), points[steps[-1]][2])


def _parsed(lines: Sequence[bytes]) -> tuple[list[Any], int]:
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

"""Slow ranks, by robust statistics over ranks and time.

Inside a collective everybody is as slow as the slowest, so what counts is a rank's time outside: data and compute.
A rank is compared with the median of the others (bad node) and with its own best (getting worse). A mark alone does
nothing: a fixed small piece of work, timed on every rank, must find the same machine slow. When all are slow
together, nobody is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

WINDOW_STEPS = 50
WINDOWS = 3
SCORE = 0.7
_PROBE_SCORE = 0.8  # the probe has no data, no network and no batch in it: less noise
_MAD_TO_SIGMA = 1.4826
_SIGMAS = 3.0
_GROUP_KEEPS = 0.85  # of its best: below, everybody became slower
_LEAST_S = 0.002  # a difference below costs nobody anything


@dataclass(frozen=True)
class Mark:
    """A worker that looks slow.

    Args:
        signal: relative (slower than the others), individual (slower than it was while the others are not), or both.
        relative: median of the others / its own; 0.5 is twice as slow.
        individual: its best window / its last.
    """

    worker: str
    signal: Literal["relative", "individual", "both"]
    relative: float
    individual: float
    evidence: str


@dataclass(frozen=True)
class Confirmation:
    """What the second signal says about a mark."""

    worker: str
    confirmed: bool
    score: float
    evidence: str


class SlowRanks:
    """Seconds outside collectives in, marks out.

    Args:
        window: steps whose median is one observation.
        windows: consecutive slow observations that make a mark.
    """

    def __init__(self, *, window: int = WINDOW_STEPS, windows: int = WINDOWS, score: float = SCORE) -> None:
        self._window, self._windows, self._score = window, windows, score
        self._samples: dict[str, list[float]] = {}
        self._best: dict[str, float] = {}
        self._group_best = float("inf")
        self._relative: dict[str, int] = {}
        self._individual: dict[str, int] = {}

    def new_generation(self, members: Sequence[str]) -> None:
        """Start a window with these workers; what is known of those that stay is kept."""
        self._samples = {worker: [] for worker in members}
        for counts in (self._best, self._relative, self._individual):
            for gone in counts.keys() - set(members):
                del counts[gone]

    def add(self, worker: str, own_s: float) -> None:
        """A step's seconds outside collectives; a worker that is not a member is ignored."""
        if worker in self._samples:
            self._samples[worker].append(own_s)

    def check(self) -> list[Mark]:
        """Marks of the window that just closed; empty while it is open."""
        if len(self._samples) < 2 or any(len(taken) < self._window for taken in self._samples.values()):
            return []
        own = {worker: max(median(taken), 1e-9) for worker, taken in self._samples.items()}
        self._samples = {worker: [] for worker in own}
        group = median(own.values())
        self._group_best = min(self._group_best, group)
        outliers = _outliers(own)
        return [mark for worker in own if (mark := self._judge(worker, own, group, worker in outliers))]

    def _judge(self, worker: str, own: Mapping[str, float], group: float, outlier: bool) -> Mark | None:
        self._best[worker] = min(own[worker], self._best.get(worker, own[worker]))
        others = median(value for other, value in own.items() if other != worker)
        relative, individual = others / own[worker], self._best[worker] / own[worker]
        matters = own[worker] - others > _LEAST_S
        alone = self._group_best / group >= _GROUP_KEEPS and own[worker] - self._best[worker] > _LEAST_S
        slower = _count(self._relative, worker, relative < self._score and outlier and matters)
        worse = _count(self._individual, worker, individual < self._score and alone)
        if max(slower, worse) < self._windows:
            return None
        both = slower >= self._windows and worse >= self._windows
        self._relative[worker] = self._individual[worker] = 0
        text = (
            f"{worker} takes {own[worker] * 1e3:.1f} ms a step outside collectives, the others {others * 1e3:.1f} ms"
            f" (score {relative:.2f}), its own best {self._best[worker] * 1e3:.1f} ms (score {individual:.2f}),"
            f" for {self._windows} windows of {self._window} steps"
        )
        signal = "both" if both else "relative" if slower >= self._windows else "individual"
        return Mark(worker, signal, relative, individual, text)


def confirm(worker: str, probe_s: Mapping[str, float]) -> Confirmation:
    """Judge a marked worker by the time of one fixed piece of work on it and on the others.

    Args:
        probe_s: seconds by worker, of the same small matrix product, say; taken at the same time.
    """
    others = [seconds for other, seconds in probe_s.items() if other != worker]
    if worker not in probe_s or not others:
        return Confirmation(worker, False, 1.0, f"no probe compares {worker} with another")
    score = median(others) / max(probe_s[worker], 1e-9)
    slow = score < _PROBE_SCORE
    said = "the machine is slow" if slow else "the machine is sound: its data or its share of the work is uneven"
    text = f"the probe takes {probe_s[worker] * 1e3:.1f} ms on {worker} and {median(others) * 1e3:.1f} ms on the others: {said}"
    return Confirmation(worker, slow, score, text)


def _outliers(own: Mapping[str, float]) -> set[str]:
    """Who stands out from the spread of all; with half the ranks on older cards nobody does. Few ranks have no spread."""
    if len(own) < 4:
        return set(own)
    middle = median(own.values())
    spread = _MAD_TO_SIGMA * median(abs(value - middle) for value in own.values())
    return {worker for worker, value in own.items() if value > middle + _SIGMAS * spread}


def _count(counts: dict[str, int], worker: str, again: bool) -> int:
    counts[worker] = counts.get(worker, 0) + 1 if again else 0
    return counts[worker]

"""Who goes on and who is stopped, from what has been reported, in the order in which it was.

A scheduler is a state machine without clock, chance or input beside its calls: told the same points in the same order
it says the same again, which is how a sweep is restored after its driver died. Values are losses here: lower is better
(the caller turns a metric to be maximised around). Trials are numbers. Populations are in `population.py`.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import Protocol

NEVER = 2**62


@dataclass(frozen=True)
class Rung:
    """A trial came to a rung, and what that meant."""

    rung: int
    step: int
    value: float
    promoted: bool


@dataclass(frozen=True)
class Verdict:
    """What a point means for its trial: rungs it came to, and whether it is stopped."""

    rungs: tuple[Rung, ...] = ()
    stop: bool = False


GO_ON = Verdict()


class Scheduler(Protocol):
    def next_decision(self, trial: int) -> int:
        """The step from which on this trial has to wait for an answer."""
        ...

    def point(self, trial: int, step: int, value: float) -> Verdict:
        """A trial has reported. Steps of a trial only grow."""
        ...


class NoScheduler:
    """Everybody runs to the end."""

    def next_decision(self, trial: int) -> int:
        return NEVER

    def point(self, trial: int, step: int, value: float) -> Verdict:
        return GO_ON


@dataclass
class _Ladder:
    """One successive halving without waiting (ASHA, arXiv 1810.05934, in its stopping form)."""

    grace: int
    reduction: int
    values: dict[int, list[tuple[float, int]]] = field(default_factory=dict)  # of every rung, best first

    def step_of(self, rung: int) -> int:
        return self.grace * self.reduction**rung

    def climb(self, rung: int, step: int, value: float) -> Rung:
        """Among all that have come here so far, the best 1/reduction go on, and always the best one."""
        here = self.values.setdefault(rung, [])
        mine = (value, len(here))  # of equal values, who came first
        bisect.insort(here, mine)
        promoted = here.index(mine) < -(-len(here) // self.reduction)
        return Rung(rung, step, value, promoted)


class SuccessiveHalving:
    """ASHA, and with several brackets HyperBand: bracket b begins to stop at `grace * reduction**b`.

    A trial's bracket follows from its number. The earlier a bracket stops, the more trials it gets.
    """

    def __init__(self, *, grace: int, reduction: int, brackets: int = 1) -> None:
        self._ladders = [_Ladder(grace * reduction**b, reduction) for b in range(brackets)]
        self._turns = _turns([reduction ** (brackets - 1 - b) for b in range(brackets)])
        self._rung: dict[int, int] = {}  # the next one of every trial

    def next_decision(self, trial: int) -> int:
        return self._ladder(trial).step_of(self._rung.get(trial, 0))

    def point(self, trial: int, step: int, value: float) -> Verdict:
        ladder, found = self._ladder(trial), []
        while step >= ladder.step_of(rung := self._rung.get(trial, 0)):
            self._rung[trial] = rung + 1
            found.append(ladder.climb(rung, step, value))
            if not found[-1].promoted:
                return Verdict(tuple(found), stop=True)
        return Verdict(tuple(found))

    def _ladder(self, trial: int) -> _Ladder:
        return self._ladders[self._turns[trial % len(self._turns)]]


def _turns(weights: list[int]) -> list[int]:
    """Indices in a fixed order in which each comes as often as its weight, evenly spread."""
    total, given, turns = sum(weights), [0] * len(weights), list[int]()
    for turn in range(1, total + 1):
        owed = [weight * turn / total - had for weight, had in zip(weights, given, strict=True)]
        turns.append(owed.index(max(owed)))
        given[turns[-1]] += 1
    return turns


class MedianStopping:
    """A trial is stopped whose best value so far is worse than the median of the others' means at that step (Vizier)."""

    def __init__(self, *, grace: int, others: int = 3) -> None:
        self._grace, self._others = grace, others
        self._seen: dict[int, tuple[float, float, int]] = {}  # best, sum, count of every trial
        self._means: dict[int, list[float]] = {}  # at every step, sorted

    def next_decision(self, trial: int) -> int:
        return self._grace

    def point(self, trial: int, step: int, value: float) -> Verdict:
        best, total, count = self._seen.get(trial, (value, 0.0, 0))
        self._seen[trial] = best, total, count = min(best, value), total + value, count + 1
        means = self._means.setdefault(step, [])
        stop = step >= self._grace and len(means) >= self._others and best > means[len(means) // 2]
        bisect.insort(means, total / count)
        return Verdict(stop=stop)

"""Population based training (arXiv 1711.09846) as a state machine: who copies whom, and what becomes of the copy.

Every `interval` steps a member compares itself with what the others last had. One of the worst takes over the state of
one of the best and goes on with its parameters, changed. Chance comes from the seed, the member and its step alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tigerbot_jobs.sweep.schedulers import GO_ON, Verdict
from tigerbot_jobs.sweep.space import Dimension, Space

_RESAMPLED = 0.25  # of the fields, drawn anew; the others become a fifth larger or smaller
_FACTORS = (0.8, 1.2)


@dataclass(frozen=True)
class Exploit(Verdict):
    """`source` is the member whose state is taken over."""

    source: int = -1


class Population:
    """The members' last values.

    Args:
        interval: steps between two comparisons of a member.
        quantile: the share at either end.
        seed: of every draw.
    """

    def __init__(self, *, interval: int, quantile: float, seed: int) -> None:
        self._interval, self._quantile, self._seed = interval, quantile, seed
        self._values: dict[int, float] = {}
        self._next: dict[int, int] = {}

    def next_decision(self, trial: int) -> int:
        return self._next.get(trial, self._interval)

    def point(self, trial: int, step: int, value: float) -> Verdict:
        self._values[trial] = value
        if step < self.next_decision(trial):
            return GO_ON
        self._next[trial] = (step // self._interval + 1) * self._interval
        ranked = sorted(self._values, key=lambda member: (self._values[member], member))
        count = math.floor(len(ranked) * self._quantile)
        if count < 1 or trial not in ranked[-count:]:
            return GO_ON
        source = random.Random(f"{self._seed}/{trial}/{step}/source").choice(ranked[:count])
        # Until it reports again, its value is the one whose state it has: nobody learns from it what it was.
        self._values[trial] = self._values[source]
        return Exploit(source=source)

    def explore(
        self, space: Space, params: Mapping[str, Any], trial: int, step: int, fixed: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The parameters of a copy: each a little changed, or drawn anew."""
        chance = random.Random(f"{self._seed}/{trial}/{step}/explore")
        return space.draw(lambda dimension: _changed(dimension, params.get(dimension.name), chance), fixed)


def _changed(dimension: Dimension, value: Any, chance: random.Random) -> Any:
    anew, place, factor = chance.random() < _RESAMPLED, chance.random(), chance.choice(_FACTORS)
    if value is None or anew:
        return dimension.at(place)
    if dimension.kind == "choice":
        at = dimension.place(value) + (1 if factor > 1 else -1)
        return dimension.values[min(max(at, 0), len(dimension.values) - 1)]
    low, high = dimension.values
    moved = min(max(value * factor, low), high)
    if dimension.kind.endswith("int"):
        away = math.ceil(moved) if factor > 1 else math.floor(moved)
        return min(max(away, low), high)
    return moved

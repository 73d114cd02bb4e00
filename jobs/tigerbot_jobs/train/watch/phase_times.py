"""How long each phase of a step takes, learned from the last hundred steps: what a deadline is made of.

Kept per phase and step is the slowest rank's time: one number a step, however many ranks there are, and a deadline
that fits the slowest of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

WINDOW_STEPS = 100
ENOUGH = 5  # steps of a phase after which its learned times count
FACTOR = 5.0
SLACK_S = 5.0
TURN = "turn"  # from one step to the next, all phases together


@dataclass(frozen=True)
class Floor:
    """The least a deadline's learned part can be: before anything is learned, and after."""

    unlearned_s: float
    learned_s: float


# Compiling, first touches and first connections make a first step of minutes; evaluation and saving have no rhythm.
FLOORS: Mapping[str, Floor] = {
    "form": Floor(60.0, 30.0),
    "restore": Floor(300.0, 60.0),
    "data": Floor(60.0, 0.25),
    "forward": Floor(120.0, 0.25),
    "backward": Floor(120.0, 0.25),
    "step": Floor(120.0, 0.25),
    "agree": Floor(60.0, 0.25),
    "snapshot": Floor(60.0, 1.0),
    "save": Floor(300.0, 10.0),
    "eval": Floor(300.0, 10.0),
    TURN: Floor(600.0, 60.0),
}


class PhaseTimes:
    """Durations by phase and the deadlines that follow: `max(floor, 5 x p99) + 5 s`.

    Args:
        floor_s: other learned floors, by phase.
    """

    def __init__(self, floor_s: Mapping[str, float] | None = None) -> None:
        given = floor_s or {}
        self._floors = {
            phase: Floor(max(floor.unlearned_s, given.get(phase, 0.0)), given.get(phase, floor.learned_s))
            for phase, floor in FLOORS.items()
        }
        self._slowest: dict[str, dict[int, float]] = {}
        self._p99: dict[str, float] = {}

    def add(self, phase: str, step: int, seconds: float) -> None:
        """A rank spent so long in a phase at a step."""
        window = self._slowest.setdefault(phase, {})
        window[step] = max(seconds, window.get(step, 0.0))
        if len(window) > WINDOW_STEPS:
            del window[next(iter(window))]
        self._p99.pop(phase, None)

    def p99(self, phase: str) -> float:
        """The 99th percentile (nearest rank) of a phase over the last hundred steps; 0 before there is one."""
        if phase not in self._p99:
            window = sorted(self._slowest.get(phase, {}).values())
            self._p99[phase] = window[math.ceil(0.99 * len(window)) - 1] if window else 0.0
        return self._p99[phase]

    def deadline_s(self, phase: str, *, warm: bool = True) -> float:
        """Seconds after which a rank is late in a phase; `idle` has none, nor has a phase we do not know.

        Args:
            warm: every rank has its first steps behind it, so that what was learned holds.
        """
        floor = self._floors.get(phase)
        if floor is None:
            return math.inf
        learned = warm and len(self._slowest.get(phase, {})) >= ENOUGH
        return max(floor.learned_s if learned else floor.unlearned_s, FACTOR * self.p99(phase)) + SLACK_S

"""A budget: how often an action may be taken, refilled by time and by progress.

What cures once may be done again; what has to be done over and over does not cure. Every action the platform takes by
itself has one of these.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Spent:
    """Whether an action may be taken."""

    allowed: bool
    left: int
    evidence: str


class Budget:
    """`n` actions at most, one more every `per_s / n` seconds, all of them again after enough progress.

    Args:
        n: actions in a row.
        per_s: seconds in which a spent budget is full again.
        steps: optimizer steps forward after which it is full again; 0 for never.
        clock: monotonic seconds.
    """

    def __init__(
        self, name: str, n: int, per_s: float, *, steps: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if n < 1 or not per_s > 0:
            raise ValueError(f"a budget of {n} in {per_s} s is none")
        self._name, self._n, self._per_s, self._steps, self._clock = name, n, per_s, steps, clock
        self._level, self._at = float(n), clock()
        self._furthest, self._taken_at_step = 0, 0

    @property
    def left(self) -> int:
        """Actions that may be taken now."""
        self._refill()
        return int(self._level + 1e-9)

    def take(self) -> bool:
        """Take one action, if one is left."""
        return self.ask().allowed

    def ask(self) -> Spent:
        """`take`, with the reason for the ledger."""
        if self.left < 1:
            return Spent(False, 0, f"the budget for {self._name} is spent: {self._n} in {self._per_s:g} s")
        self._level -= 1
        self._taken_at_step = self._furthest
        return Spent(True, self.left, f"{self._name}: {self.left} of {self._n} left")

    def progress(self, step: int) -> None:
        """The run got as far as this step; steps done again are no progress."""
        self._furthest = max(self._furthest, step)
        if self._steps and self._furthest - self._taken_at_step >= self._steps:
            self._level = float(self._n)

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._n, self._level + max(0.0, now - self._at) * self._n / self._per_s)
        self._at = now

"""The bounds of a run's recovery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class HubSettings:
    """Bounds of a run's recovery. Times in seconds.

    Attributes:
        low, high: workers that may train.
        expected: workers that Ray was asked for, standbys among them.
        start_wait_s: how long the first generation waits for its full size.
        out_wait_s: how long a living member may take to leave an ended generation before it is ended.
        max_failures: faults until the run stops; -1: as many as there are, while there is progress.
        silence_s: without a heartbeat for so long, a worker is frozen or its node is gone.
    """

    low: int
    high: int
    expected: int
    token: str
    start_wait_s: float = 60.0
    out_wait_s: float = 10.0
    max_failures: int = -1
    silence_s: float = 5.0
    hang_floor_s: Mapping[str, float] | None = None

    @property
    def full(self) -> int:
        """Workers that train when all that Ray was asked for are there."""
        return min(self.high, self.expected)

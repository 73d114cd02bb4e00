"""The nodes of every replica: in the job, warm, idle, or away until a known time.

A node that is away comes back as an idle spare (repaired) or as a standby (warmed up). Counts only: nodes have no
names, and no memory of earlier faults.
"""

from __future__ import annotations

import numpy as np


class Fleet:
    """Node counts of R replicas. `next_s` is when the next node comes back, infinite when none is away."""

    def __init__(self, replicas: int, active: int, warm: int, cold: int) -> None:
        self.active = np.full(replicas, float(active))
        self.warm = np.full(replicas, float(warm))
        self.cold = np.full(replicas, float(cold))
        self.warming = np.zeros(replicas)
        self.next_s = np.full(replicas, np.inf)
        self._when = np.full((replicas, 8), np.inf)
        self._count = np.zeros((replicas, 8))
        self._as_warm = np.zeros((replicas, 8), dtype=bool)

    def away(self, which: np.ndarray, until_s: np.ndarray, count: np.ndarray, *, as_warm: bool = False) -> None:
        """`count` nodes of each replica in `which` are away until `until_s`."""
        slot = np.argmax(self._when[which], axis=1)
        if np.isfinite(self._when[which, slot]).any():
            self._grow()
            slot = np.argmax(self._when[which], axis=1)
        self._when[which, slot] = until_s
        self._count[which, slot] = count
        self._as_warm[which, slot] = as_warm
        self.next_s[which] = np.minimum(self.next_s[which], until_s)

    def back(self, which: np.ndarray) -> np.ndarray:
        """The next nodes of each replica come back; says where a warm one did."""
        rows = self._when[which]
        slot = np.argmin(rows, axis=1)
        rows[np.arange(len(which)), slot] = np.inf
        self._when[which, slot] = np.inf
        self.next_s[which] = rows.min(axis=1)
        count, as_warm = self._count[which, slot], self._as_warm[which, slot]
        self.warm[which] += np.where(as_warm, count, 0)
        self.warming[which] -= np.where(as_warm, count, 0)
        self.cold[which] += np.where(as_warm, 0, count)
        return as_warm

    def keep_warm(self, which: np.ndarray, wanted: np.ndarray, now_s: np.ndarray, takes_s: float) -> None:
        """Begin to warm idle nodes until `wanted` are warm or warming."""
        count = np.minimum(self.cold[which], np.maximum(wanted - self.warm[which] - self.warming[which], 0))
        some = count > 0
        if not some.any():
            return
        which, count = which[some], count[some]
        self.cold[which] -= count
        self.warming[which] += count
        self.away(which, now_s[some] + takes_s, count, as_warm=True)

    def _grow(self) -> None:
        replicas, slots = self._when.shape
        self._when = np.concatenate([self._when, np.full((replicas, slots), np.inf)], axis=1)
        self._count = np.concatenate([self._count, np.zeros((replicas, slots))], axis=1)
        self._as_warm = np.concatenate([self._as_warm, np.zeros((replicas, slots), dtype=bool)], axis=1)

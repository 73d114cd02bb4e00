"""What training has done and what of it is safe, for all replicas at once, in closed form between two events.

Snapshots follow a fixed pattern: n times (t1 of work, d1 blocked), then d2 blocked for a storage checkpoint, which is
valid once it has been written for w2 more seconds. So a stretch of undisturbed running of any length is one evaluation
of a piecewise linear function, not an event per snapshot.

Shapes: R replicas. `total` and the marks are (2, R): row 0 is seconds of stepping, row 1 work (seconds at full speed).
"""

from __future__ import annotations

import numpy as np

from tigerbot_jobs.simulate.setting import Tiers

_CLOSE = 1e-9


class Progress:
    """Work done, and where a restore would go back to.

    Attributes:
        total: stepping and work that are part of the history so far.
        memory, storage: `total` at the last valid snapshot of each tier.
        blocked_s: seconds spent in snapshots and checkpoints.
        undone_s: seconds of stepping that restores have thrown away.
        speed: (2, R): row 0 is 1, row 1 the speed relative to the full job.
    """

    def __init__(self, tiers: Tiers, replicas: int) -> None:
        self.tiers = tiers
        self.total = np.zeros((2, replicas))
        self.memory = np.zeros((2, replicas))
        self.storage = np.zeros((2, replicas))
        self.speed = np.ones((2, replicas))
        self.blocked_s = np.zeros(replicas)
        self.undone_s = np.zeros(replicas)
        self._begun = np.zeros((2, replicas))  # total at the last storage checkpoint that was begun
        self._position = np.zeros(replicas)  # seconds since then, blocks included
        self._worked = np.zeros(replicas)  # seconds of work in `_position`
        self._taken = np.zeros(replicas)  # snapshots taken in `_position`

    def advance(self, dt: np.ndarray) -> None:
        """Run for `dt` seconds (0 where a replica does not run)."""
        tiers, per = self.tiers, self.tiers.memory_per_storage
        small, work_per_period = tiers.memory_every_s + tiers.memory_block_s, per * tiers.memory_every_s
        reached = self._position + dt
        periods = np.floor(reached / tiers.period_s)
        position = reached - periods * tiers.period_s
        taken = np.minimum(np.floor(position / small), per)
        worked = taken * tiers.memory_every_s + np.minimum(position - taken * small, tiers.memory_every_s)
        np.minimum(worked, work_per_period, out=worked)
        before_last = periods * work_per_period - self._worked
        stepped = before_last + worked
        if tiers.memory:
            fresh = periods * per + taken > self._taken
            mark = self.total + self.speed * (before_last + taken * tiers.memory_every_s)
            np.copyto(self.memory, mark, where=fresh)
        self._mark_storage(reached, periods, before_last, work_per_period)
        self.total += self.speed * stepped
        self.blocked_s += dt - stepped
        self._position, self._worked, self._taken = position, worked, taken

    def _mark_storage(
        self, reached: np.ndarray, periods: np.ndarray, before_last: np.ndarray, work_per_period: float
    ) -> None:
        write_s, period_s = self.tiers.storage_write_s, self.tiers.period_s
        ended = self.total + self.speed * before_last
        if write_s == 0:
            np.copyto(self.storage, ended, where=periods > 0)
            np.copyto(self._begun, ended, where=periods > 0)
            return
        written = np.floor((reached - write_s) / period_s)
        fresh = written > np.floor((self._position - write_s) / period_s)
        np.copyto(self.storage, self._begun, where=fresh & (written == 0))
        last = ended - self.speed * ((periods - written) * work_per_period)
        np.copyto(self.storage, last, where=fresh & (written > 0))
        np.copyto(self._begun, ended, where=periods > 0)

    def restore_memory(self, which: np.ndarray) -> None:
        """Go back to the last memory snapshot. A storage checkpoint under way is written anew from memory."""
        self._undo(which, self.memory)
        self._worked[which] = self._taken[which] * self.tiers.memory_every_s
        self._position[which] = self._taken[which] * (self.tiers.memory_every_s + self.tiers.memory_block_s)

    def restore_storage(self, which: np.ndarray) -> None:
        """Go back to the last storage checkpoint; the memory tier begins anew there."""
        self._undo(which, self.storage)
        self._begin_period(which)

    def restore_older_storage(self, which: np.ndarray) -> None:
        """The last storage checkpoint cannot be read: go back to the one before it."""
        older = self.storage[:, which] - self.speed[:, which] * self.tiers.storage_every_s
        self.storage[:, which] = np.maximum(older, 0.0)
        self.restore_storage(which)

    def save(self, which: np.ndarray) -> None:
        """Everything done so far is safe in both tiers."""
        self.storage[:, which] = self.total[:, which]
        self._begin_period(which)

    def _undo(self, which: np.ndarray, mark: np.ndarray) -> None:
        self.undone_s[which] += self.total[0, which] - mark[0, which]
        self.total[:, which] = mark[:, which]

    def _begin_period(self, which: np.ndarray) -> None:
        self.memory[:, which] = self.storage[:, which]
        self._begun[:, which] = self.storage[:, which]
        self._position[which] = self._worked[which] = self._taken[which] = 0.0

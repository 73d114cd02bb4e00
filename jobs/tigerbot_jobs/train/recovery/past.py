"""The run's history as it counts now: where its generations began, what a rollback undid, which batches are left out.

It reads no shard and no storage; it says which of the snapshots that others find belong to the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tigerbot_jobs.train.recovery.inventory import Restored, newest_whole
from tigerbot_jobs.train.recovery.messages import ShardAt


class Past:
    """History of one run, over all its lives.

    Args:
        history: of the earlier lives.
    """

    def __init__(self, history: list[Restored]) -> None:
        self._history = list(history)
        self.at_most: int | None = None  # no later step may be taken: a rollback
        self.skips: list[list[int]] = []  # global batches, [first, last] each
        self.guard: dict[str, Any] = {}  # the loss guard's state

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever trained: no state is anywhere."""
        return not self._history

    def newest_whole(self, shards: Iterable[ShardAt]) -> list[ShardAt]:
        """The newest snapshot among `shards` that is whole and not undone, by rank."""
        return newest_whole(shards, self._history, at_most=self.at_most)

    def began(self, generation: int, step: int) -> None:
        """A generation has begun at a step: what older ones did after it is undone."""
        self._history.append(Restored(generation, step))

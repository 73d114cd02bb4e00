"""From shared memory to storage, beside the training: which snapshot goes, and when it counts.

The keepers of the nodes upload, each its own workers' shards; the hub alone commits, when all of them have arrived. The
interval follows Young and Daly from what a checkpoint costs and how often this run fails.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from tigerbot.errors import TigerError
from tigerbot.storage import ManifestFile, Store
from tigerbot_jobs.train.checkpoint import Header, checkpoint_key, commit
from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery.inventory import Stored

PRIOR_CARD_HOURS = 50_700.0  # one unexpected interruption in so many (Llama 3, arXiv 2407.21783)
_SURVIVED_IN_MEMORY = 0.95  # of faults, by a shard in shared memory or on a peer
_FLOOR_S, _CEILING_S = 30.0, 1800.0
_WRITE_SHARE = 0.03
_RETRIES_S = (0.5, 1, 2, 5, 10, 20, 30)


@dataclass(frozen=True)
class _Set:
    """The whole snapshot of one step: (node, path, rank) of every shard."""

    generation: int
    step: int
    header: dict[str, Any]
    shards: tuple[tuple[str, str, int], ...]


PersistOn = Callable[[str, Callable[[int], say.Message], float], Awaitable[say.Put]]


class Persister:
    """Keeps snapshots in storage.

    Args:
        store, prefix: where: `<prefix>/step-00000123`.
        keep: how many checkpoints stay.
        every_s: seconds between two, or None: by Young and Daly.
        cards: of the whole run, for the failure rate before any failure was seen.
    """

    def __init__(self, store: Store, prefix: str, *, keep: int, every_s: float | None, cards: int) -> None:
        self._store, self._prefix, self._keep = store, prefix, keep
        self._every_s, self._cards = every_s, cards
        self._began = self._kept_at = time.monotonic()
        self._write_s = 0.0
        self._faults = 0
        self._arrived: dict[tuple[int, int], dict[int, tuple[str, str]]] = defaultdict(dict)
        self._work: set[asyncio.Task[None]] = set()
        self._busy = asyncio.Lock()
        self._asked_at = 0.0
        self._epoch = 0
        self._problem = ""
        self.kept_step = -1
        # Set by the hub.
        self.persist_on: PersistOn
        self.ask_for_snapshot: Callable[[], None]
        self.log: Callable[..., None]

    def tick(self) -> None:
        """Called often: ask the ranks for a snapshot to keep when one is due."""
        now = time.monotonic()
        if now - self._kept_at >= self.interval_s() and now - self._asked_at > 5.0 and not self._work:
            self.request()

    def request(self) -> None:
        """Have the ranks mark their next snapshot for keeping."""
        self._asked_at = time.monotonic()
        self.ask_for_snapshot()

    def fault(self) -> None:
        self._faults += 1

    def interval_s(self) -> float:
        """Seconds between two checkpoints (Young 1974, Daly 2006), at least twice what writing one takes."""
        if self._every_s is not None:
            return self._every_s
        hours = (time.monotonic() - self._began) / 3600
        mean_s = 3600 * (PRIOR_CARD_HOURS + self._cards * hours) / self._cards / (1 + self._faults)
        blocked_s = 0.02 + 0.05 * self._write_s  # the write itself takes memory bandwidth from the step
        best = math.sqrt(2 * blocked_s * mean_s / (1 - _SURVIVED_IN_MEMORY))
        if not self._faults:
            # Nothing is known of this machine yet: as often as writing takes 3% of the time.
            best = min(best, self._write_s / _WRITE_SHARE)
        return min(_CEILING_S, max(_FLOOR_S, 2 * self._write_s, best))

    def saved(self, node: str, rank: int, message: say.Saved) -> None:
        """A rank's snapshot waits in shared memory; the last one of its step starts the upload."""
        key = (message.generation, message.step)
        if rank >= 0:
            self._arrived[key][rank] = (node, message.path)
        header = message.header
        wanted = 1 if header["zero_stage"] == 0 else header["world_size"]
        if len(self._arrived[key]) == wanted:
            found = self._arrived.pop(key)
            shards = tuple((node, path, rank) for rank, (node, path) in sorted(found.items()))
            self.keep(_Set(message.generation, message.step, header, shards))

    def keep_shards(self, shards: list[say.ShardAt], header: dict[str, Any]) -> None:
        """Keep a whole snapshot that keepers hold, whether or not its workers still live."""
        about = tuple((shard.node, shard.path, shard.rank) for shard in shards)
        self.keep(_Set(shards[0].generation, shards[0].step, header, about))

    def keep(self, snapshot: _Set) -> None:
        task = asyncio.get_running_loop().create_task(self._keep_one(snapshot, self._epoch))
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    def forget(self) -> None:
        """A generation is over: what has not arrived whole never will."""
        self._arrived.clear()

    def undo(self) -> None:
        """History was rolled back: what is being written is not part of it."""
        self._epoch += 1

    async def settled(self, timeout_s: float) -> str:
        """Wait until nothing is being written and no snapshot is awaited; why the last one was not kept, or nothing."""
        until = time.monotonic() + timeout_s
        asked_at = self._asked_at
        while time.monotonic() < until:
            waiting = asked_at and self._kept_at < asked_at and time.monotonic() - asked_at < 5
            if not self._work and not waiting:
                return self._problem
            await asyncio.sleep(0.02)
        return self._problem or f"storage did not take the last checkpoint within {timeout_s:.0f} s"

    async def newest(self, at_most: int | None) -> Stored:
        """The newest checkpoint; with `at_most`, later ones are removed: a rollback has undone them."""
        return await asyncio.to_thread(self._newest, at_most)

    def _newest(self, at_most: int | None) -> Stored:
        found = sorted(self._store.committed(self._prefix))
        for key in [key for key in found if at_most is not None and _step_of(key) > at_most]:
            self._store.delete(key)
            found.remove(key)
        return Stored(_step_of(found[-1]), found[-1]) if found else Stored(-1, "")

    async def _keep_one(self, snapshot: _Set, epoch: int) -> None:
        async with self._busy:
            for wait_s in (*_RETRIES_S, None):
                began = time.monotonic()
                problem, size_bytes, final = await self._attempt(snapshot, epoch)
                if not problem:
                    took = time.monotonic() - began
                    self._write_s, self._kept_at, self.kept_step = took, time.monotonic(), snapshot.step
                    self._problem = ""
                    self.log("persisted", step=snapshot.step, seconds=round(took, 3), size_bytes=size_bytes)
                    return
                if problem != self._problem:
                    self.log(
                        "fault_seen", fault="storage", worker="", rank=-1, node="", step=snapshot.step, evidence=problem
                    )
                self._problem = problem
                if final or wait_s is None or epoch != self._epoch:
                    return
                await asyncio.sleep(wait_s)

    async def _attempt(self, snapshot: _Set, epoch: int) -> tuple[str, int, bool]:
        """Upload and commit once: what went wrong, bytes, and whether another try is pointless."""
        key = checkpoint_key(self._prefix, snapshot.step)
        by_node: dict[str, list[list[Any]]] = defaultdict(list)
        for node, path, rank in snapshot.shards:
            by_node[node].append([path, rank])

        def order(files: list[list[Any]]) -> Callable[[int], say.Message]:
            return lambda request: say.Persist(request, key, snapshot.step, snapshot.generation, files)

        asked = [self.persist_on(node, order(files), max(120.0, 10 * self._write_s)) for node, files in by_node.items()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        files: list[ManifestFile] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                return "a keeper did not answer", 0, isinstance(answer, LookupError)
            if answer.problem:
                return answer.problem, 0, answer.problem.startswith("gone")
            files += [ManifestFile(**file) for file in answer.files]
        if epoch != self._epoch:
            return "", 0, True
        try:
            await asyncio.to_thread(self._commit, key, snapshot.header, files)
        except (TigerError, OSError) as error:
            return str(error), 0, False
        return "", sum(file.size_bytes for file in files), True

    def _commit(self, key: str, header: dict[str, Any], files: list[ManifestFile]) -> None:
        commit(self._store, key, Header(**header), files)
        self._store.retain(self._prefix, self._keep)


def _step_of(key: str) -> int:
    return int(key.rsplit("step-", 1)[1])

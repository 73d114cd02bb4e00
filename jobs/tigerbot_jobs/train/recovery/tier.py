"""Where a rank under the hub keeps its state: shared memory first, storage from there, and back.

Every k-th step goes into shared memory, k such that it costs at most 2% of the time. What is to go to storage is marked
there for the keeper, and the step goes on.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from tigerbot.storage import open_store
from tigerbot_jobs.train import reshard, zero_state
from tigerbot_jobs.train.checkpoint import Checkpoints
from tigerbot_jobs.train.engine import Engine
from tigerbot_jobs.train.loop import Prepared, Progress
from tigerbot_jobs.train.memory import SnapshotBuffer, interval, read_snapshots
from tigerbot_jobs.train.recovery.keeper import dial, fetch_range
from tigerbot_jobs.train.recovery.link import Link
from tigerbot_jobs.train.recovery.messages import Form, Saved, ShardAt
from tigerbot_jobs.train.shard import Shard


class Tier:
    """The `Keep` of one rank in one generation.

    Args:
        path: of this process's snapshot file; it outlives the process.
        node: the name of this node.
    """

    def __init__(self, prepared: Prepared, form: Form, link: Link, path: Path, node: str) -> None:
        self._prepared, self._form, self._link = prepared, form, link
        self._path, self._node = path, node
        self._buffer: SnapshotBuffer | None = None
        self._every, self._last, self._copy_s = 1, form.step, 0.0
        self._tolerance = prepared.job.spec.fault_tolerance

    def restore(self, engine: Engine) -> Progress:
        form = self._form
        if form.tier == "memory":
            with ExitStack() as open_peers:
                shards = [self._opened(at, open_peers) for at in form.shards]
                extra = self._assemble(engine, shards)
            return Progress.of(form.step, extra)
        if form.tier == "storage":
            found = self._checkpoints().restore(engine, self._prepared.identity())
            if found is not None:
                return Progress.of(*found)
        engine.clear_padding()
        return Progress(0)

    def due(self, step: int) -> bool:
        return step - self._last >= self._every

    def save_due(self, step: int) -> bool:
        if self._tolerance.checkpoint_every_steps:
            return step % self._tolerance.checkpoint_every_steps == 0
        return self._link.save_wanted(self._form.generation)

    def snapshot(self, engine: Engine, progress: Progress, *, save: bool) -> None:
        state = engine.state()
        if self._buffer is None:
            self._buffer = SnapshotBuffer.create(self._path, state, self._meta(engine, progress))
        meta = self._meta(engine, progress)
        self._copy_s = self._buffer.write(state, meta, hold=save and self._saves(engine))
        self._last = progress.step
        if save and self._saves(engine):
            header = self._prepared.identity().header(engine, progress.step, self._form.world_size)
            self._link.send(Saved(self._form.generation, progress.step, str(self._path), asdict(header)))

    def rewind(self, engine: Engine, at_most: int) -> Progress | None:
        own = [one for one in read_snapshots(self._path) if one.meta.step <= at_most]
        own = [one for one in own if one.meta.generation == self._form.generation]
        if not own:
            return None
        newest = max(own, key=lambda one: one.meta.step)
        extra = self._assemble(engine, [Shard.over(newest.view, str(self._path))])
        self._last = newest.meta.step
        return Progress.of(newest.meta.step, extra)

    def spent(self, step_s: float) -> None:
        """How long a step takes, for how often a snapshot may."""
        self._every = interval(self._copy_s, step_s, self._every)

    def _saves(self, engine: Engine) -> bool:
        return self._form.rank == 0 or engine.zero_stage > 0

    def _meta(self, engine: Engine, progress: Progress) -> ShardMeta:
        form = self._form
        held = tuple(engine.slices())
        return ShardMeta(
            progress.step, form.rank, form.world_size, engine.zero_stage, form.generation, held, progress.as_extra()
        )

    def _checkpoints(self) -> Checkpoints:
        spec = self._prepared.job.spec
        return Checkpoints(open_store(spec.storage.uri), f"{spec.name}/checkpoints", keep=spec.storage.keep)

    def _assemble(self, engine: Engine, shards: list[Shard]) -> dict:
        def read(shard: int, name: str, begin: int, end: int) -> Tensor:
            return shards[shard].tensor(name, begin, end)

        engine.assemble([shard.meta for shard in shards], read)
        return shards[0].meta.extra

    def _opened(self, at: ShardAt, open_peers: ExitStack) -> Shard:
        """A shard on this node is mapped, one on another is asked for range by range."""
        if at.node == self._node:
            return Shard.open_at(at.path, at.offset, at.size)
        peer = open_peers.enter_context(dial(at.address))
        token = self._prepared.job.token
        return Shard(lambda a, b: fetch_range(peer, token, at.path, at.offset + a, at.offset + b), at.path)

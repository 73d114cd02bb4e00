"""Where a rank under the hub keeps its state: shared memory first, storage from there, and back.

Every k-th step goes into shared memory, k such that it costs at most 2% of the time. What is to go to storage is marked
there for the keeper, and the step goes on.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from tigerbot_jobs.train.engine import Engine
from tigerbot_jobs.train.keeping import Progress
from tigerbot_jobs.train.memory import SnapshotBuffer, interval, read_snapshots
from tigerbot_jobs.train.prepared import Prepared
from tigerbot_jobs.train.recovery.link import Link
from tigerbot_jobs.train.recovery.messages import Form, Saved, ShardAt
from tigerbot_jobs.train.recovery.shard_server import dial, fetch_range
from tigerbot_jobs.train.shard import Shard


class Tier:
    """The `Keep` of one rank in one generation.

    Args:
        folder: of this run on this node, in shared memory.
        name: of this process; its snapshots outlive it.
        node: what this node is called.
    """

    def __init__(self, prepared: Prepared, form: Form, link: Link, folder: Path, name: str, node: str) -> None:
        self._prepared, self._form, self._link, self._node = prepared, form, link, node
        # A generation has a file of its own: the older ones, of the dead too, live until it is whole on every rank.
        self._path = folder / f"worker-{name}.{form.generation}"
        self._written = 0
        self._buffer: SnapshotBuffer | None = None
        self._tolerance = prepared.job.spec.fault_tolerance
        self._last, self._copy_s = form.step, 0.0
        wanted = self._tolerance.snapshot_every_steps
        self._fixed = None if wanted == "auto" else wanted
        self._every = self._fixed or 1

    def restore(self, engine: Engine) -> Progress:
        if self._form.tier == "storage":
            return self._prepared.restored(engine)
        if self._form.tier == "none":
            return Progress(0)
        with ExitStack() as open_peers:
            return self._assemble(engine, [self._opened(at, open_peers) for at in self._form.shards])

    def due(self, step: int) -> bool:
        return step - self._last >= self._every

    def save_due(self, step: int) -> bool:
        if self._tolerance.checkpoint_every_steps:
            return step % self._tolerance.checkpoint_every_steps == 0
        return self._link.save_wanted(self._form.generation)

    def snapshot(self, engine: Engine, progress: Progress, *, save: bool) -> None:
        form, state = self._form, engine.state()
        saves = save and (form.rank == 0 or engine.zero_stage > 0)
        meta = engine.shard(generation=form.generation, extra=progress.as_extra())
        if self._buffer is None:
            self._buffer = SnapshotBuffer.create(self._path, meta, state)
        self._copy_s = self._buffer.write(
            state, step=progress.step, generation=form.generation, extra=meta.extra, hold=saves
        )
        self._last = progress.step
        self._written += 1
        if self._written == 2:  # every rank has its first one: they met in a step since
            self._forget_older()
        if saves:
            header = self._prepared.header(engine, progress.step, form.world_size, form.generation)
            self._link.send(Saved(form.generation, progress.step, str(self._path), asdict(header)))

    def rewind(self, engine: Engine, at_most: int) -> Progress | None:
        own = [one for one in read_snapshots(self._path) if one.step <= at_most] if self._buffer else []
        if not own:
            return None
        self._last = own[0].step
        return self._assemble(engine, [own[0].shard()])

    def spent(self, step_s: float) -> None:
        """How long a step takes, for how often a snapshot may."""
        if self._fixed is None and self._copy_s:
            self._every = interval(self._copy_s, step_s, before=self._every)

    def _forget_older(self) -> None:
        for path in self._path.parent.glob("worker-*"):
            if int(path.suffix.removeprefix(".") or 0) < self._form.generation:
                path.unlink(missing_ok=True)

    def _assemble(self, engine: Engine, shards: list[Shard]) -> Progress:
        def read(shard: int, name: str, begin: int, end: int) -> Tensor:
            return shards[shard].tensor(name, begin, end)

        engine.restore([shard.meta for shard in shards], read)
        return Progress.of(shards[0].meta.step, shards[0].meta.extra)

    def _opened(self, at: ShardAt, open_peers: ExitStack) -> Shard:
        """A shard on this node is mapped, one on another is asked for range by range."""
        if at.node == self._node:
            return Shard.open(at.path, begin=at.offset, end=at.offset + at.size)
        peer = open_peers.enter_context(dial(at.address))
        token = self._prepared.job.token
        return Shard(lambda a, b: fetch_range(peer, token, at.path, at.offset + a, at.offset + b), at.path)

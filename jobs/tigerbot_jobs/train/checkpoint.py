"""Checkpoints: every rank's shard and the step, in storage whole or not at all, for any number of ranks to go on from.

`step-00000123/` holds `rank-00000.safetensors` of every rank (of one where all hold the same) and `header.json`; the
manifest is written last, when every file has arrived. Whoever dies in between leaves nothing that is taken for a
checkpoint. One whose bytes have changed is set aside, and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tigerbot.errors import CorruptError, StorageError
from tigerbot.storage import MANIFEST, Manifest, ManifestFile, MissingError, Store, sha256_file
from tigerbot_jobs.train.identity import check_same
from tigerbot_jobs.train.reshard import Read
from tigerbot_jobs.train.shard import FORMAT_VERSION, Shard, ShardMeta, write_shard

if TYPE_CHECKING:
    from torch import Tensor  # keepers read this file, and have no torch

HEADER = "header.json"


@dataclass(frozen=True)
class Header:
    """What a checkpoint is of. `step` optimizer steps are done: the data position follows from it.

    `world_size`, `zero_stage` and `threads` say how it was made; they need not be the same again, but sums are exact
    only where they are.
    """

    step: int
    world_size: int
    zero_stage: int
    spec_hash: str
    tokenizer_hash: str
    threads: int
    generation: int = 0
    format_version: int = FORMAT_VERSION
    data_hash: str = ""  # of the training shards' manifests; empty: unknown
    model: dict[str, Any] = field(default_factory=dict)  # see `identity.model_fields`; empty: unknown

    def check(self, where: str, **wanted: Any) -> None:
        """Compare what it is of with a run's `spec_hash`, `tokenizer_hash`, `data_hash` and `model`.

        Raises:
            IdentityError: some differ; each is named.
        """
        check_same({name: getattr(self, name) for name in wanted}, wanted, where)


class Checkpoints:
    """The checkpoints of one run, as one rank sees them. Methods marked collective must be called by every rank.

    Args:
        store: where they are.
        prefix: `<run name>/checkpoints`.
        keep: how many are kept.
        say: told, on rank 0, what a person should know.
    """

    def __init__(self, store: Store, prefix: str, *, keep: int, say: Callable[[str], None] = print) -> None:
        import torch.distributed as dist

        self._store, self._prefix, self._keep, self._say = store, prefix, keep, say
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def save(self, state: dict[str, Tensor], meta: ShardMeta, header: Header) -> float:
        """Collective. Keep a state; returns the seconds it took. At stage 0 rank 0 keeps it for all."""
        import torch.distributed as dist

        began = time.perf_counter()
        key = checkpoint_key(self._prefix, header.step)
        mine = [] if header.zero_stage == 0 and self._rank else [self._put_state(key, state, meta)]
        gathered: list[list[ManifestFile]] = [[] for _ in range(self._world_size)]
        dist.all_gather_object(gathered, mine)
        if self._rank == 0:
            commit(self._store, key, header, [file for part in gathered for file in part])
            self._store.retain(self._prefix, self._keep)
        dist.barrier()
        return time.perf_counter() - began

    def latest(self) -> str | None:
        """Collective. The newest whole checkpoint, the same on every rank."""
        import torch.distributed as dist

        found: list[str | None] = [None]
        if self._rank == 0:
            found[0] = max(self._store.committed(self._prefix), default=None)
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def header(self, key: str) -> Header | None:
        """Collective. What a checkpoint is of; None where that is damaged: it is set aside, and it was said so.

        Raises:
            StorageError: it was written by a newer program.
        """
        found: list[Header] = []
        return found[0] if self._all_right(key, lambda: found.append(read_header(self._store, key))) else None

    def restore(self, key: str, put: Callable[[list[ShardMeta], Read], None], *, wanted: Any) -> bool:
        """Collective. Hand a checkpoint's shards to `put` (an engine's `restore`) on every rank.

        Args:
            wanted: given all shards, the indices of those that this rank reads; only they are fetched and verified.

        Returns:
            Whether its bytes were right. If not, it is set aside, what was put is worth nothing, and it was said so.
        """
        with ExitStack() as stack:
            reading = _Reading(self._store, key, stack)
            if not self._all_right(key, lambda: reading.open(wanted)):
                return False
            put(reading.metas, reading.read)
            return self._all_right(key, reading.verify)

    def _all_right(self, key: str, check: Callable[[], None]) -> bool:
        import torch.distributed as dist

        damage = None
        try:
            check()
        except (CorruptError, MissingError) as error:
            damage = str(CorruptError(error.what, where=error.where))
        found: list[str | None] = [None] * self._world_size
        dist.all_gather_object(found, damage)
        said = next((line for line in found if line), None)
        if said is not None and self._rank == 0:
            self._store.set_aside(key)
            self._say(f"checkpoint {key} is damaged ({said}); it is set aside, and the one before it is used")
        dist.barrier()
        return said is None

    def _put_state(self, key: str, state: dict[str, Tensor], meta: ShardMeta) -> ManifestFile:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / file_of(self._rank)
            write_shard(local, meta, state)
            return persist_file(self._store, key, local, local.name)


class _Reading:
    """One rank's view of a checkpoint: all shards' metadata, and the bytes of those it needs, hashed while they are read."""

    def __init__(self, store: Store, key: str, stack: ExitStack) -> None:
        self._store, self._key, self._stack = store, key, stack
        self._shards: dict[int, Shard] = {}
        self._hashes: list[tuple[ManifestFile, Future[str]]] = []
        self.metas: list[ShardMeta] = []

    def open(self, wanted: Callable[[list[ShardMeta]], set[int]]) -> None:
        files = [file for file in self._store.manifest(self._key).files if file.path.endswith(".safetensors")]
        self.metas = [self._meta(file) for file in files]
        hashing = self._stack.enter_context(ThreadPoolExecutor(max_workers=1))
        for index in sorted(wanted(self.metas)):
            local = self._local(files[index])
            if local.stat().st_size != files[index].size_bytes:
                raise self._differs(files[index])
            self._shards[index] = Shard.open(local)
            self._hashes.append((files[index], hashing.submit(sha256_file, local)))

    def read(self, shard: int, name: str, begin: int, end: int) -> Tensor:
        return self._shards[shard].tensor(name, begin, end)

    def verify(self) -> None:
        for file, found in self._hashes:
            if found.result() != file.sha256:
                raise self._differs(file)

    def _meta(self, file: ManifestFile) -> ShardMeta:
        key = f"{self._key}/{file.path}"
        return Shard(lambda begin, end: self._store.get_range(key, begin, end), self._store.at(key)).meta

    def _local(self, file: ManifestFile) -> Path:
        in_place = self._store.local(f"{self._key}/{file.path}")
        if in_place is not None:
            return in_place
        local = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / file.path
        self._store.get_file(f"{self._key}/{file.path}", local)
        return local

    def _differs(self, file: ManifestFile) -> CorruptError:
        where = self._store.at(f"{self._key}/{file.path}")
        return CorruptError("differs from its manifest", where=where, fix="use an older checkpoint")


def read_header(store: Store, key: str) -> Header:
    """What a checkpoint is of.

    Raises:
        CorruptError: its bytes have changed.
        StorageError: it was written by a newer program.
    """
    data, where = store.get_bytes(f"{key}/{HEADER}"), store.at(f"{key}/{HEADER}")
    said = {file.path: file.sha256 for file in store.manifest(key).files}
    if said.get(HEADER) != hashlib.sha256(data).hexdigest():
        raise CorruptError("differs from its manifest", where=where, fix="use an older checkpoint")
    raw = json.loads(data)
    if raw["format_version"] != FORMAT_VERSION:
        newer = raw["format_version"] > FORMAT_VERSION
        raise StorageError(
            f"has format version {raw['format_version']}, this program reads {FORMAT_VERSION}",
            where=store.at(key),
            fix="use a newer program" if newer else "finish it with the program that began it, or --replace",
        )
    return Header(**raw)


def persist_file(store: Store, key: str, source: Path | memoryview, name: str) -> ManifestFile:
    """Put one file of a checkpoint; it counts when `commit` names it. A buffer must not change meanwhile."""
    target = f"{key}/{name}"
    if isinstance(source, Path):
        store.put_file(source, target)
        return ManifestFile(path=name, size_bytes=source.stat().st_size, sha256=sha256_file(source))
    if store.local(target) is not None:
        store.put_bytes(target, source)  # type: ignore[arg-type]
        return ManifestFile(path=name, size_bytes=len(source), sha256=hashlib.sha256(source).hexdigest())
    with tempfile.TemporaryDirectory() as folder:
        # Large objects go to a bucket in parts, out of a file.
        local = Path(folder) / name
        local.write_bytes(source)
        return persist_file(store, key, local, name)


def commit(store: Store, key: str, header: Header, files: list[ManifestFile]) -> None:
    """Make a checkpoint of what was persisted, by one writer.

    Raises:
        StorageError: a rank's file is missing.
    """
    expected = {file_of(rank) for rank in range(1 if header.zero_stage == 0 else header.world_size)}
    missing = sorted(expected - {file.path for file in files})
    if missing:
        raise StorageError(f"{missing[0]} has not arrived", where=store.at(key), fix="wait for every rank")
    data = json.dumps(asdict(header), indent=1).encode()
    store.put_bytes(f"{key}/{HEADER}", data)
    described = ManifestFile(path=HEADER, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    store.put_bytes(f"{key}/{MANIFEST}", Manifest(files=(*files, described)).to_bytes())


def checkpoint_key(prefix: str, step: int) -> str:
    return f"{prefix}/step-{step:08d}"


def file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"

"""Checkpoints: every rank's shard and what they are of, in storage whole or not at all.

`step-00000123/` holds `rank-00000.safetensors` of every rank and `header.json`; the manifest is written last. Whoever
dies in between leaves nothing that is taken for a checkpoint. Read back at any world size and any ZeRO stage.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tigerbot.errors import CorruptError, IdentityError, StorageError
from tigerbot.storage import MANIFEST, Manifest, ManifestFile, Store, sha256_file
from tigerbot_jobs.train.engine import Engine
from tigerbot_jobs.train.shard import FORMAT_VERSION, Shard, ShardMeta, encode_header

DAMAGED = "damaged"


@dataclass(frozen=True)
class Header:
    """What a checkpoint is of. `step` optimizer steps are done: the data position follows from it.

    `threads` is recorded because sums are exact only for an equal number of them.
    """

    step: int
    world_size: int
    zero_stage: int
    spec_hash: str
    tokenizer_hash: str
    threads: int
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to go on from a checkpoint, and the threads it was made with."""

    spec_hash: str
    tokenizer_hash: str
    threads: int

    def header(self, engine: Engine, step: int, world_size: int) -> Header:
        return Header(step, world_size, engine.zero_stage, self.spec_hash, self.tokenizer_hash, self.threads)

    def check(self, header: Header, where: str) -> None:
        """Raises: IdentityError: the checkpoint is of something else, by the first field that differs."""
        for field in ("spec_hash", "tokenizer_hash"):
            before, now = getattr(header, field), getattr(self, field)
            if before != now:
                raise IdentityError(
                    f"{field} was {before}, now it is {now}",
                    where=where,
                    fix="resume it as it was, or --replace to begin anew",
                )


class Checkpoints:
    """The checkpoints of one run, as one rank sees them. Methods marked collective must be called by every rank.

    Args:
        store: where they are.
        prefix: `<run name>/checkpoints`.
        keep: how many are kept.
    """

    def __init__(self, store: Store, prefix: str, *, keep: int) -> None:
        self._store, self._prefix, self._keep = store, prefix, keep
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def save(self, engine: Engine, step: int, extra: dict[str, Any], identity: Identity) -> float:
        """Collective. Keep a state, every rank its own part; returns the seconds it took."""
        began = time.perf_counter()
        key = f"{self._prefix}/step-{step:08d}"
        header = identity.header(engine, step, self._world_size)
        replicated = engine.zero_stage == 0  # every rank holds the same whole state: one of them keeps it for all
        mine = [] if replicated and self._rank else [self._put_shard(key, engine, header, extra)]
        gathered: list[list[ManifestFile]] = [[] for _ in range(self._world_size)]
        dist.all_gather_object(gathered, mine)
        if self._rank == 0:
            commit(self._store, key, header, [file for part in gathered for file in part])
            self._store.retain(self._prefix, self._keep)
        dist.barrier()
        return time.perf_counter() - began

    def restore(self, engine: Engine, identity: Identity) -> tuple[int, dict[str, Any]] | None:
        """Collective. Put the newest checkpoint that is undamaged into an engine: its step and extra; None: there is none.

        One whose bytes differ from its manifest is set aside, said so, and the one before it is taken.

        Raises:
            IdentityError: it is of another spec or tokenizer.
            StorageError: a newer program wrote it.
        """
        while (key := self._newest()) is not None:
            header = self.header(key)
            identity.check(header, self._store.at(key))
            with ExitStack() as opened:
                shards, problem = self._opened(key, header, opened)
                if not self._any_problem(problem):

                    def read(shard: int, name: str, begin: int, end: int, shards: list[Shard] = shards) -> Tensor:
                        return shards[shard].tensor(name, begin, end)

                    engine.assemble([shard.meta for shard in shards], read)
                    return header.step, shards[0].meta.extra
            if self._rank == 0:
                self._set_aside(key, problem)
            dist.barrier()
        return None

    def header(self, key: str) -> Header:
        """Raises: StorageError: it was written by a newer program, or by one from before this format."""
        raw = json.loads(self._store.get_bytes(f"{key}/header.json"))
        version = raw["format_version"]
        if version != FORMAT_VERSION:
            newer = version > FORMAT_VERSION
            raise StorageError(
                f"has format version {version}, this program reads {FORMAT_VERSION}",
                where=self._store.at(key),
                fix="use a newer program" if newer else "finish it with the program that wrote it, or --replace",
            )
        return Header(**raw)

    def _newest(self) -> str | None:
        found: list[str | None] = [None]
        if self._rank == 0:
            whole = [key for key in self._store.committed(self._prefix) if not self._store.exists(f"{key}/{DAMAGED}")]
            found[0] = max(whole, default=None)
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _opened(self, key: str, header: Header, opened: ExitStack) -> tuple[list[Shard], str]:
        """Every shard of a checkpoint; a rank verifies those it is the first to need, while others are read."""
        files = [file for file in self._store.manifest(key).files if file.path.startswith("rank-")]
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        shards, problem = [], ""
        mine = range(self._rank, len(files), self._world_size)
        with ThreadPoolExecutor(max_workers=1) as hashing:
            hashes = {}
            for index, file in enumerate(files):
                local = self._store.local(f"{key}/{file.path}")
                if local is None:
                    local = folder / file.path
                    self._store.get_file(f"{key}/{file.path}", local)
                if index in mine:
                    hashes[file] = hashing.submit(sha256_file, local)
                try:
                    shards.append(Shard.open(local))
                except (CorruptError, ValueError, OSError):
                    problem = f"{file.path} is not a whole shard"
            for file, found in hashes.items():
                if found.result() != file.sha256:
                    problem = f"{file.path} differs from its manifest"
        return shards, problem

    def _any_problem(self, problem: str) -> bool:
        flag = torch.tensor([bool(problem)], dtype=torch.int64)
        if dist.get_backend() == "nccl":
            flag = flag.cuda()
        dist.all_reduce(flag)
        return bool(flag)

    def _set_aside(self, key: str, problem: str) -> None:
        where = self._store.at(key)
        why = problem or "a shard differs from its manifest"
        self._store.put_bytes(f"{key}/{DAMAGED}", why.encode())
        print(f"  {where}: {why}; it is not used, the checkpoint before it is", flush=True)

    def _put_shard(self, key: str, engine: Engine, header: Header, extra: dict[str, Any]) -> ManifestFile:
        meta = ShardMeta(
            header.step, self._rank, header.world_size, header.zero_stage, 0, tuple(engine.slices()), extra
        )
        name = f"rank-{self._rank:05d}.safetensors"
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / name
            write_image(local, engine.state(), meta)
            self._store.put_file(local, f"{key}/{name}")
            return ManifestFile(path=name, size_bytes=local.stat().st_size, sha256=sha256_file(local))


def write_image(path: Path, state: dict[str, Tensor], meta: ShardMeta) -> None:
    """A state as the shard image that shared memory holds too."""
    with path.open("wb") as file:
        file.write(encode_header(meta, {name: tensor.numel() for name, tensor in state.items()}))
        for tensor in state.values():
            file.write(memoryview(tensor.detach().cpu().numpy().reshape(-1)).cast("B"))


def commit(store: Store, key: str, header: Header, files: list[ManifestFile]) -> None:
    """Make a checkpoint of files that have all arrived."""
    data = json.dumps(asdict(header), indent=1).encode()
    store.put_bytes(f"{key}/header.json", data)
    about = ManifestFile(path="header.json", size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    store.put_bytes(f"{key}/{MANIFEST}", Manifest(files=(*files, about)).to_bytes())

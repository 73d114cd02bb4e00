"""Checkpoints: every rank's state and the step, in storage whole or not at all.

`step-00000123/` holds `rank-00000.safetensors` of every rank and `header.json`; the manifest is written last, by rank
0, when every rank's file has arrived. Whoever dies in between leaves nothing that is taken for a checkpoint.
"""

from __future__ import annotations

import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tigerbot.errors import CorruptError, StorageError
from tigerbot.storage import MANIFEST, Manifest, ManifestFile, Store, sha256_file

FORMAT_VERSION = 1


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

    def save(self, state: dict[str, Tensor], header: Header, *, replicated: bool) -> float:
        """Collective. Keep a state; returns the seconds it took."""
        began = time.perf_counter()
        key = f"{self._prefix}/step-{header.step:08d}"
        mine = [] if replicated and self._rank else [self._put_state(key, state)]
        gathered: list[list[ManifestFile]] = [[] for _ in range(self._world_size)]
        dist.all_gather_object(gathered, mine)
        if self._rank == 0:
            files = [file for part in gathered for file in part]
            files.append(self._put_header(key, header))
            self._store.put_bytes(f"{key}/{MANIFEST}", Manifest(files=tuple(files)).to_bytes())
            self._store.retain(self._prefix, self._keep)
        dist.barrier()
        return time.perf_counter() - began

    def latest(self) -> str | None:
        """Collective. The newest whole checkpoint, the same on every rank."""
        found: list[str | None] = [None]
        if self._rank == 0:
            found[0] = max(self._store.committed(self._prefix), default=None)
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def header(self, key: str) -> Header:
        """Raises: StorageError: it was written by a newer program."""
        raw = json.loads(self._store.get_bytes(f"{key}/header.json"))
        if raw["format_version"] > FORMAT_VERSION:
            raise StorageError(
                f"has format version {raw['format_version']}, this program reads up to {FORMAT_VERSION}",
                where=self._store.at(key),
                fix="use a newer program",
            )
        return Header(**raw)

    def load(self, key: str, *, replicated: bool) -> dict[str, Tensor]:
        """This rank's state.

        Raises:
            CorruptError: the file differs from its checksum.
        """
        name = _file_of(0 if replicated else self._rank)
        wanted = next(file for file in self._store.manifest(key).files if file.path == name)
        in_place = self._store.local(f"{key}/{name}")
        if in_place is not None:
            return self._verified(in_place, wanted, key)
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / name
            self._store.get_file(f"{key}/{name}", local)
            return self._verified(local, wanted, key)

    def _verified(self, local: Path, wanted: ManifestFile, key: str) -> dict[str, Tensor]:
        """The tensors of a file; they are read while it is hashed, and given only if the hash is right."""
        with ThreadPoolExecutor(max_workers=1) as hashing:
            found = hashing.submit(sha256_file, local)
            try:
                state = load_file(local) if local.stat().st_size == wanted.size_bytes else None
            except SafetensorError:
                state = None  # a header that was damaged: the hash says so too
            if state is None or found.result() != wanted.sha256:
                raise CorruptError(
                    "differs from its manifest",
                    where=self._store.at(f"{key}/{wanted.path}"),
                    fix=f"remove {self._store.at(key)}; the same command goes on from the checkpoint before it",
                )
        return state

    def _put_state(self, key: str, state: dict[str, Tensor]) -> ManifestFile:
        name = _file_of(self._rank)
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / name
            save_file({part: tensor.contiguous() for part, tensor in state.items()}, local)
            self._store.put_file(local, f"{key}/{name}")
            return ManifestFile(path=name, size_bytes=local.stat().st_size, sha256=sha256_file(local))

    def _put_header(self, key: str, header: Header) -> ManifestFile:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / "header.json"
            local.write_text(json.dumps(asdict(header), indent=1))
            self._store.put_file(local, f"{key}/header.json")
            return ManifestFile(path="header.json", size_bytes=local.stat().st_size, sha256=sha256_file(local))


def _file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"

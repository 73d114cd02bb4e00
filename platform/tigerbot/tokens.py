"""Token shards on disk: written once, memory-mapped for ever after.

A shard folder holds fixed-length training sequences: `ids.bin` (uint16 where the vocabulary fits, else uint32),
`mask.bin` (one bit a token: does it carry loss), `starts.bin` (one bit a token: does a document begin here) and
`manifest.json` with sizes and SHA-256, written last. Reading order is a pure function of (seed, epoch, position), so
a run resumes at an exact sample on any number of workers. This module knows nothing about tokenizers or models.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tigerbot.errors import CorruptError, DataError

FORMAT_VERSION = 1
IGNORE = -100


@dataclass(frozen=True)
class Packed:
    """One training sequence: T token ids, T loss flags, T document-start flags. Padding has no loss."""

    ids: np.ndarray
    loss: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class Batch:
    """n sequences of T tokens, all int64 of shape (n, T).

    `labels` are the ids where loss counts, -100 elsewhere and at the first token of every document;
    `position_ids` begin anew at every document; `attention_mask` is 0 on padding.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray


def write_shards(
    folder: str | Path,
    sequences: Iterable[Packed],
    sequence_length: int,
    *,
    tokenizer_hash: str,
    vocab_size: int,
    pad_id: int,
) -> Path:
    """Write a shard folder; it appears whole, by rename, or not at all.

    Raises:
        DataError: a sequence has another length, an id is outside the vocabulary, or there is no sequence.
    """
    target = Path(folder)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    kind = np.dtype("<u2") if vocab_size <= 65_536 else np.dtype("<u4")
    count = 0
    with (
        (staged / "ids.bin").open("wb") as ids,
        (staged / "mask.bin").open("wb") as mask,
        (staged / "starts.bin").open("wb") as starts,
    ):
        for packed in sequences:
            if len(packed.ids) != sequence_length:
                raise DataError(f"a sequence has {len(packed.ids)} tokens, wants {sequence_length}", where=str(target))
            if packed.ids.max(initial=0) >= vocab_size:
                raise DataError(
                    f"token id {packed.ids.max()} is outside the vocabulary of {vocab_size}",
                    where=str(target),
                    fix="pack with the tokenizer of this model",
                )
            ids.write(packed.ids.astype(kind).tobytes())
            mask.write(np.packbits(packed.loss.astype(bool)).tobytes())
            starts.write(np.packbits(packed.starts.astype(bool)).tobytes())
            count += 1
    if not count:
        shutil.rmtree(staged)
        raise DataError("holds no training sequence", where=str(target), fix="give it more text")
    files = {name: _described(staged / name) for name in ("ids.bin", "mask.bin", "starts.bin")}
    manifest = {
        "format_version": FORMAT_VERSION,
        "sequences": count,
        "sequence_length": sequence_length,
        "dtype": kind.str,
        "vocab_size": vocab_size,
        "pad_id": pad_id,
        "tokenizer_hash": tokenizer_hash,
        "files": files,
    }
    (staged / "manifest.json").write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    return target


def manifests_hash(folders: Iterable[str | Path]) -> str:
    """Identity of the data in shard folders: 16 hex digits over their manifests, which hold every file's checksum."""
    digest = hashlib.sha256()
    for folder in folders:
        digest.update((Path(folder) / "manifest.json").read_bytes())
    return digest.hexdigest()[:16]


class TokenShards:
    """Fixed-length training sequences in a shard folder.

    Args:
        folder: written by `write_shards`.
        sequence_length: T; the folder's own when not given.
        verify: compare every file with its checksum once at opening.

    Raises:
        DataError: the folder has no manifest, is of a newer format, or has another sequence length.
        CorruptError: a file's size or checksum differs from the manifest.
    """

    def __init__(self, folder: str | Path, sequence_length: int | None = None, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.manifest = self._read_manifest()
        self.sequence_length: int = self.manifest["sequence_length"]
        self.tokenizer_hash: str = self.manifest["tokenizer_hash"]
        self.vocab_size: int = self.manifest["vocab_size"]
        if sequence_length not in (None, self.sequence_length):
            raise DataError(
                f"sequences have {self.sequence_length} tokens, the spec wants {sequence_length}",
                where=str(folder),
                fix="set data.sequence_length to the corpus', or pack again",
            )
        self._check(verify)

    def __len__(self) -> int:
        return self.manifest["sequences"]

    @property
    def tokens(self) -> int:
        return len(self) * self.sequence_length

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The sequences at these indices."""
        rows = np.asarray(indices, dtype=np.int64)
        ids = self._ids[rows].astype(np.int64)
        length = self.sequence_length
        loss = np.unpackbits(self._mask[rows], axis=1, count=length).astype(bool)
        starts = np.unpackbits(self._starts[rows], axis=1, count=length).astype(bool)
        labels = np.where(loss & ~starts, ids, IGNORE)
        places = np.broadcast_to(np.arange(length), ids.shape)
        began = np.maximum.accumulate(np.where(starts, places, 0), axis=1)
        return Batch(ids, labels, places - began, (ids != self.manifest["pad_id"]).astype(np.int64))

    @cached_property
    def _ids(self) -> np.ndarray:
        shape = (len(self), self.sequence_length)
        return np.memmap(self.folder / "ids.bin", dtype=self.manifest["dtype"], mode="r", shape=shape)

    @cached_property
    def _mask(self) -> np.ndarray:
        return self._bits("mask.bin")

    @cached_property
    def _starts(self) -> np.ndarray:
        return self._bits("starts.bin")

    def _bits(self, name: str) -> np.ndarray:
        return np.memmap(self.folder / name, dtype=np.uint8, mode="r", shape=(len(self), -(-self.sequence_length // 8)))

    def _read_manifest(self) -> dict:
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                "is not a folder of token shards (no manifest.json)",
                where=str(self.folder),
                fix="run a corpus spec first",
            ) from None
        except json.JSONDecodeError:
            raise CorruptError("manifest.json is not JSON", where=str(self.folder), fix="pack again") from None
        if manifest["format_version"] > FORMAT_VERSION:
            raise DataError(
                f"has format version {manifest['format_version']}, this program reads up to {FORMAT_VERSION}",
                where=str(self.folder),
                fix="use a newer program",
            )
        return manifest

    def _check(self, verify: bool) -> None:
        for name, wanted in self.manifest["files"].items():
            path = self.folder / name
            size = path.stat().st_size if path.exists() else -1
            if size != wanted["size_bytes"] or (verify and _described(path)["sha256"] != wanted["sha256"]):
                raise CorruptError("differs from its manifest", where=str(path), fix="pack the corpus again")


class Mixture:
    """Several shard folders drawn by weight, in an order that depends on nothing but the seed and the position.

    Position p belongs to the source that lags its weight the most (the largest deficit), so after any number of
    positions every source is within one sequence of its share. Within a source, epoch e visits every sequence once,
    permuted by (seed, source, e).
    """

    def __init__(self, sources: Sequence[tuple[TokenShards, float]], seed: int) -> None:
        if not sources:
            raise DataError("names no source", where="data", fix="add one")
        self.shards = [shards for shards, _ in sources]
        weights = np.array([weight for _, weight in sources], dtype=np.float64)
        self.weights = weights / weights.sum()
        self.seed = seed
        self._sources = np.empty(0, dtype=np.int16)
        self._ranks = np.empty(0, dtype=np.int64)
        self._drawn = np.zeros(len(sources), dtype=np.int64)

    @property
    def sequence_length(self) -> int:
        return self.shards[0].sequence_length

    def batch(self, position: int, size: int) -> Batch:
        """Sequences `position .. position + size` of the run's order."""
        places = self.places(position, size)
        parts = [self.shards[source].batch([index]) for source, index in places] if len(self.shards) > 1 else None
        if parts is None:
            return self.shards[0].batch([index for _, index in places])
        fields = ("input_ids", "labels", "position_ids", "attention_mask")
        return Batch(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))

    def places(self, position: int, size: int) -> list[tuple[int, int]]:
        """(source, index in it) of every position."""
        self._draw(position + size)
        found = []
        for place in range(position, position + size):
            source, rank = int(self._sources[place]), int(self._ranks[place])
            epoch, offset = divmod(rank, len(self.shards[source]))
            found.append((source, permuted(offset, len(self.shards[source]), (self.seed, source, epoch))))
        return found

    def _draw(self, until: int) -> None:
        """Extend the source of every position: a pure function of the weights, so it needs no state on resume."""
        have = len(self._sources)
        if until <= have:
            return
        until = max(until, 2 * have, 1024)
        sources, ranks = np.empty(until, dtype=np.int16), np.empty(until, dtype=np.int64)
        sources[:have], ranks[:have] = self._sources, self._ranks
        drawn = self._drawn
        for place in range(have, until):
            source = int(np.argmax(self.weights * (place + 1) - drawn))
            sources[place], ranks[place] = source, drawn[source]
            drawn[source] += 1
        self._sources, self._ranks = sources, ranks


def permuted(index: int, size: int, key: tuple[int, ...]) -> int:
    """A permutation of [0, size) keyed by integers: a 4-round Feistel network, cycle-walked into range."""
    half = max((size - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    value = index
    while True:
        left, right = value >> half, value & low
        for turn in range(4):
            digest = hashlib.blake2b(repr((key, turn, right)).encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & low)
        value = (left << half) | right
        if value < size:
            return value


def _described(path: Path) -> dict:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size_bytes": path.stat().st_size, "sha256": digest.hexdigest()}

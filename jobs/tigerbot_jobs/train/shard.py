"""The image of one rank's state, the same in shared memory, over the network and in storage: a safetensors file.

It holds flat float32 tensors `{group}.master`, `.exp_avg`, `.exp_avg_sq` and `.step`; its `__metadata__` has one key,
`tiger`, with the JSON of a `ShardMeta`. Readers may have the whole image (a mapping, a buffer) or ask for byte ranges
of it. This module knows nothing about DeepSpeed, and imports torch only to hand out tensors.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tigerbot.errors import CorruptError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 2
ALIGNMENT = 64  # of the first tensor's byte
_LENGTH = struct.Struct("<Q")
_HEADER_LIMIT = 1 << 30


@dataclass(frozen=True)
class Slice:
    """Elements [start, start + numel) of the flattened parameter `name` lie in flat tensor `group` from `offset`."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    group: int
    offset: int


@dataclass(frozen=True)
class ShardMeta:
    """Whose state a shard is. `step` optimizer steps are done; `extra` is the loop's own, JSON."""

    step: int
    rank: int
    world_size: int
    zero_stage: int
    generation: int
    slices: tuple[Slice, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


Fetch = Callable[[int, int], bytes | memoryview]  # bytes [begin, end) of an image


class Shard:
    """An image that can be read from.

    Args:
        fetch: gives byte ranges of it; a buffer's are not copied.
        where: for messages.

    Raises:
        CorruptError: it is not a shard.
        StorageError: a newer program wrote it.
    """

    def __init__(self, fetch: Fetch, where: str) -> None:
        self._fetch, self._where = fetch, where
        length = _LENGTH.unpack(bytes(fetch(0, _LENGTH.size)).ljust(_LENGTH.size, b"\xff"))[0]
        if length > _HEADER_LIMIT:
            raise self._corrupt()
        self._data = _LENGTH.size + length
        self.meta, self._spans = self._parsed(bytes(fetch(_LENGTH.size, self._data)))

    @classmethod
    def over(cls, buffer: Any, where: str) -> Shard:
        """Over a bytes-like object, which must outlive what is read."""
        view = memoryview(buffer).cast("B")
        return cls(lambda begin, end: view[begin:end], where)

    @classmethod
    def open(cls, path: str | Path) -> Shard:
        """Over a file, mapped."""
        with Path(path).open("rb") as file:
            # A private mapping, whose pages torch may take for writable; nothing writes to them.
            return cls.over(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), str(path))

    @property
    def size_bytes(self) -> int:
        """Of the whole image."""
        return self._data + max((end for _, end in self._spans.values()), default=0)

    def numel(self, name: str) -> int:
        begin, end = self._spans[name]
        return (end - begin) // 4

    def names(self) -> list[str]:
        return list(self._spans)

    def array(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Elements [begin, end) of a tensor."""
        first, last = self._spans[name]
        end = (last - first) // 4 if end is None else end
        found = self._fetch(self._data + first + 4 * begin, self._data + first + 4 * end)
        array = np.frombuffer(found, dtype="<f4")
        if array.size != end - begin:
            raise self._corrupt()
        return array

    def tensor(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """As `array`."""
        import torch

        array = self.array(name, begin, end)
        return torch.from_numpy(array if array.flags.writeable else array.copy())

    def _parsed(self, header: bytes) -> tuple[ShardMeta, dict[str, tuple[int, int]]]:
        try:
            entries = json.loads(header)
            about = json.loads(entries.pop("__metadata__")["tiger"])
            version = about["format_version"]
        except (ValueError, KeyError, TypeError):
            raise self._corrupt() from None
        if version > FORMAT_VERSION:
            raise StorageError(
                f"has format version {version}, this program reads up to {FORMAT_VERSION}",
                where=self._where,
                fix="use a newer program",
            )
        try:
            held = tuple(Slice(name, tuple(shape), *place) for name, shape, *place in about.pop("slices"))
            spans = {name: tuple(entry["data_offsets"]) for name, entry in entries.items() if entry["dtype"] == "F32"}
            return ShardMeta(slices=held, **about), spans
        except (ValueError, KeyError, TypeError):
            raise self._corrupt() from None

    def _corrupt(self) -> CorruptError:
        return CorruptError("is not a whole shard", where=self._where, fix="use an older checkpoint")


def encode_header(meta: ShardMeta, numels: Mapping[str, int], size: int = 0) -> bytes:
    """What stands before the tensors, which follow in the order of `numels` without gaps.

    Args:
        size: make it this long, so that the tensors' places do not depend on what the metadata says.

    Raises:
        StorageError: the metadata does not fit into `size`.
    """
    entries: dict[str, Any] = {"__metadata__": {"tiger": _encoded(meta)}}
    end = 0
    for name, numel in numels.items():
        entries[name] = {"dtype": "F32", "shape": [numel], "data_offsets": [end, end + 4 * numel]}
        end += 4 * numel
    text = json.dumps(entries, separators=(",", ":")).encode()
    whole = size or -(-(_LENGTH.size + len(text)) // ALIGNMENT) * ALIGNMENT
    if _LENGTH.size + len(text) > whole:
        raise StorageError(
            f"the metadata of a shard takes {len(text):,} bytes, there is room for {whole - _LENGTH.size:,}",
            where="shard",
            fix="keep less in its extra",
        )
    # Safetensors allows spaces at the end.
    return _LENGTH.pack(whole - _LENGTH.size) + text.ljust(whole - _LENGTH.size)


def write_shard(path: str | Path, meta: ShardMeta, state: Mapping[str, Tensor]) -> None:
    """Write an image to a file; the tensors are flat."""
    with Path(path).open("wb") as file:
        file.write(encode_header(meta, {name: tensor.numel() for name, tensor in state.items()}))
        for tensor in state.values():
            file.write(tensor.detach().cpu().numpy().data)


def _encoded(meta: ShardMeta) -> str:
    held = [[s.name, s.shape, s.start, s.numel, s.group, s.offset] for s in meta.slices]
    fields = {name: getattr(meta, name) for name in ShardMeta.__dataclass_fields__ if name != "slices"}
    return json.dumps(fields | {"slices": held}, separators=(",", ":"))

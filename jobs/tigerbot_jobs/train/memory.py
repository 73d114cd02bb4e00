"""The memory tier: a rank's state in /dev/shm, where it outlives the process that wrote it.

A file is a control page and two slots, each with room for a shard image. A snapshot goes into the older slot, which is
invalid from its first byte to its last: whoever dies in between leaves the other one whole. All memory is taken and
touched once, at the start. Readers need neither torch nor the engine.
"""

from __future__ import annotations

import math
import mmap
import os
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tigerbot.errors import CorruptError, StorageError
from tigerbot.staging import disk_errors, publish, staged
from tigerbot_jobs.train.shard import Shard, ShardMeta, encode_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VERSION = 1
SLOTS = 2
_PAGE = 4096
_MAGIC = int.from_bytes(b"TIGERMEM", "little")
# The control page in words of 8 bytes: magic, version, slot size; each slot's begin at _SLOT * (index + 1).
_SLOT = 8
_STATE, _SEQUENCE, _STEP, _GENERATION, _SIZE, _HELD = range(6)
_EMPTY, _WRITING, _VALID = range(3)
_EXTRA_BYTES = 32_768  # that a snapshot's own `extra` may take: the loss guard's window is the largest part
_HOLD_S = 1.0  # a reader that is slower, or gone, does not stop the training


@dataclass(frozen=True)
class Snapshot:
    """A whole shard image in shared memory, as long as its slot is not written again."""

    step: int
    generation: int
    slot: int
    begin: int  # of the image in its file
    view: memoryview
    _control: np.ndarray = field(repr=False)
    _sequence: int

    def shard(self) -> Shard:
        return Shard.over(self.view, f"slot {self.slot}")

    def unchanged(self) -> bool:
        """Whether what was read from `view` until now is this snapshot. Ask after copying it."""
        words = _words(self._control, self.slot)
        return words[_STATE] == _VALID and words[_SEQUENCE] == self._sequence


class SnapshotDevice(Protocol):
    """How a state gets from where it is into shared memory."""

    def begin(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Copy every (from, to). It may go on while the next forward and backward run, which do not change a state."""
        ...

    def wait(self) -> None:
        """Return when it is done: before the next optimizer step."""
        ...


class CpuCopy:
    """State in main memory: the copy is done at once."""

    def begin(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        for source, target in pairs:
            target.copy_(source)

    def wait(self) -> None:
        pass


class CudaCopy:
    """State on a GPU: the slots are pinned where they lie, and filled by a stream of its own.

    Args:
        memory: the mapped slots.
    """

    def __init__(self, memory: Tensor, device: torch.device) -> None:
        import torch

        code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)  # type: ignore[union-attr]
        if int(code):
            raise StorageError(f"cannot be pinned (CUDA error {int(code)})", where="/dev/shm", fix="raise ulimit -l")
        self._stream = torch.cuda.Stream(device)
        self._memory = memory  # it stays mapped for as long as it is pinned
        weakref.finalize(self, _unpin, memory.data_ptr()).atexit = False

    def begin(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        import torch

        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        self._stream.synchronize()


def _unpin(address: int) -> None:
    """A process has many of these one after another: the next may lie where this one was."""
    import torch

    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[union-attr]


class SnapshotBuffer:
    """The writer's side. Make it with `create`."""

    def __init__(self, path: Path, memory: mmap.mmap, meta: ShardMeta, state: Mapping[str, Tensor]) -> None:
        import torch

        self.path, self._memory, self._meta = path, memory, meta
        self._numels = {name: tensor.numel() for name, tensor in state.items()}
        self._header_bytes = _header_bytes(meta, self._numels)
        self._control = np.frombuffer(memory, dtype="<u8", count=_PAGE // 8)
        self._slot_bytes = int(self._control[2])
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        floats = [whole[self._at(slot) + self._header_bytes :] for slot in range(SLOTS)]
        self._targets = [_split(part, self._numels) for part in floats]
        first = next(iter(state.values()))
        self._device: SnapshotDevice = CudaCopy(whole[_PAGE:], first.device) if first.is_cuda else CpuCopy()
        self._pending: int | None = None

    @classmethod
    def create(cls, path: Path, meta: ShardMeta, state: Mapping[str, Tensor]) -> SnapshotBuffer:
        """A buffer for states like this one.

        Args:
            path: under /dev/shm. What stands there is replaced: a generation's first snapshot wants a path of its own,
                so that the one before it lives until then.

        Raises:
            StorageError: there is no room.
        """
        numels = {name: tensor.numel() for name, tensor in state.items()}
        slot_bytes = _paged(_header_bytes(meta, numels) + 4 * sum(numels.values()))
        size = _PAGE + SLOTS * slot_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_room(path.parent, size)
        with disk_errors(path), staged(path) as stage:
            descriptor = os.open(stage, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                # Takes every page now: later there would be a fault at each, and a bus error where there is no room.
                os.posix_fallocate(descriptor, 0, size)
                memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            finally:
                os.close(descriptor)
            control = np.frombuffer(memory, dtype="<u8", count=_PAGE // 8)
            control[:3] = _MAGIC, VERSION, slot_bytes
            publish(stage, path)
        return cls(path, memory, meta, state)

    def write(
        self, state: Mapping[str, Tensor], *, step: int, generation: int, extra: dict[str, Any], hold: bool = False
    ) -> float:
        """Keep a state, between two optimizer steps; returns the seconds it took.

        With `hold` it stays until a reader has copied it and says `release`, or is a second late.
        """
        began = time.perf_counter()
        self.begin(state, step=step, generation=generation, extra=extra, hold=hold)
        self.finish()
        return time.perf_counter() - began

    def begin(
        self, state: Mapping[str, Tensor], *, step: int, generation: int, extra: dict[str, Any], hold: bool = False
    ) -> None:
        """As `write`, but the copy may still go on; `finish` it before the next optimizer step."""
        self.finish()
        slot = min(range(SLOTS), key=lambda slot: (self._words(slot)[_STATE] == _VALID, self._words(slot)[_SEQUENCE]))
        self._wait_for_readers(slot)
        newest = max(int(self._words(slot)[_SEQUENCE]) for slot in range(SLOTS))
        words = self._words(slot)
        words[_STATE] = _WRITING
        words[_HELD] = hold
        meta = replace(self._meta, step=step, generation=generation, extra=extra)
        header = encode_header(meta, self._numels, self._header_bytes)
        words[_SEQUENCE], words[_STEP], words[_GENERATION] = newest + 1, step, generation
        words[_SIZE] = self._header_bytes + 4 * sum(self._numels.values())
        self._memory[self._at(slot) : self._at(slot) + len(header)] = header
        targets = self._targets[slot]
        self._device.begin([(state[name], targets[name]) for name in targets])
        self._pending = slot

    def finish(self) -> None:
        """Wait for a copy that was begun, and make it count."""
        if self._pending is not None:
            self._device.wait()
            self._words(self._pending)[_STATE] = _VALID
            self._pending = None

    def _wait_for_readers(self, slot: int) -> None:
        until, words = time.monotonic() + _HOLD_S, self._words(slot)
        while words[_HELD] and time.monotonic() < until:
            time.sleep(0.001)

    def _at(self, slot: int) -> int:
        return _PAGE + slot * self._slot_bytes

    def _words(self, slot: int) -> np.ndarray:
        return _words(self._control, slot)


def read_snapshots(path: Path) -> list[Snapshot]:
    """The whole snapshots of a file, newest first.

    Raises:
        CorruptError: it is no snapshot file.
        StorageError: it is not there, or a newer program wrote it.
    """
    with disk_errors(path), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < _PAGE:
            raise CorruptError("is not a snapshot file", where=str(path), fix="remove it")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    control = np.frombuffer(memory, dtype="<u8", count=_PAGE // 8)
    if control[0] != _MAGIC:
        raise CorruptError("is not a snapshot file", where=str(path), fix="remove it")
    if control[1] != VERSION:
        raise StorageError(f"has version {control[1]}, this program reads {VERSION}", where=str(path), fix="remove it")
    found, view = [], memoryview(memory)
    for slot in range(SLOTS):
        words = _words(control, slot)
        sequence, begin = int(words[_SEQUENCE]), _PAGE + slot * int(control[2])
        if words[_STATE] == _VALID:
            image = view[begin : begin + int(words[_SIZE])]
            about = (int(words[_STEP]), int(words[_GENERATION]), slot, begin)
            found.append(Snapshot(*about, image, control, sequence))
    return sorted(found, key=lambda snapshot: -snapshot._sequence)


def release(path: Path, snapshot: Snapshot) -> None:
    """A reader has what it held a snapshot for."""
    with disk_errors(path), path.open("r+b") as file, mmap.mmap(file.fileno(), _PAGE) as memory:
        control = np.frombuffer(memory, dtype="<u8", count=_PAGE // 8)
        words = _words(control, snapshot.slot)
        if words[_SEQUENCE] == snapshot._sequence:
            words[_HELD] = 0
        del control, words  # the mapping cannot be closed while they look into it


def interval(copy_s: float, step_s: float, share: float = 0.02, *, before: int | None = None) -> int:
    """Every how many steps to take a snapshot: as often as costs at most `share` of the time.

    From the interval `before` it goes at most to its half or its double: one slow copy is no measurement.
    """
    best = max(1, math.ceil(copy_s / (share * max(step_s, 1e-9)) - 1e-9))
    return best if before is None else min(max(best, -(-before // 2)), 2 * before)


def _words(control: np.ndarray, slot: int) -> np.ndarray:
    return control[_SLOT * (slot + 1) : _SLOT * (slot + 2)]


def _header_bytes(meta: ShardMeta, numels: Mapping[str, int]) -> int:
    return _paged(len(encode_header(meta, numels)) + _EXTRA_BYTES)


def _paged(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _split(memory: Tensor, numels: Mapping[str, int]) -> dict[str, Tensor]:
    """Float tensors, one after the other, over bytes."""
    import torch

    found, at = {}, 0
    for name, numel in numels.items():
        found[name] = memory[at : at + 4 * numel].view(torch.float32)
        at += 4 * numel
    return found


def _check_room(folder: Path, size: int) -> None:
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if free < size:
        raise StorageError(
            f"two snapshots of this rank take {size / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free of "
            f"{room.f_blocks * room.f_frsize / 1e6:,.0f} MB",
            where=str(folder),
            fix="mount a larger /dev/shm",
        )

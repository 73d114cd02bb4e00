"""A bounded queue of records on disk between two processes: one appends, the other delivers and forgets.

Records stand in numbered segments, a line each: CRC-32, JSON. The reader moves a watermark when what it read has been
delivered, and removes the segments behind it. Each life of a writer begins a segment, so that what a kill or a full
disk tore is the end of one and of no interest; a death between delivery and watermark delivers again, so delivery must
be idempotent. Appending never waits for the disk: the reader makes durable what it is about to deliver, so that
nothing delivered is ever unknown here. This module knows nothing about MLflow.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from tigerbot.errors import TrackingError
from tigerbot.outbox import write_whole

SEGMENT_BYTES = 4 * 2**20
_APPLIED = "applied"
_WRITER = "writer.lock"


class Position(NamedTuple):
    """A place between two records. `offset` is in bytes."""

    segment: int
    offset: int


class SpoolFull(Exception):
    """The queue holds as much as it may."""


class SpoolWriter:
    """The appending end; its threads may share it.

    Args:
        folder: holds the segments.
        limit_bytes: of records that have not arrived.

    Raises:
        TrackingError: another process appends to this folder.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, segment_bytes: int = SEGMENT_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._limit = limit_bytes
        self._segment_bytes = segment_bytes
        self._hold = _hold_writer(folder)
        self._lock = threading.Lock()
        self._number = max([_applied(folder).segment, *_segments(folder)], default=0)
        self._file = -1
        self._size = 0
        self._waiting = backlog(folder)  # at most this much: what arrived since is not known here

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it survives the death of this process from here on.

        Raises:
            SpoolFull: there is no room; try again when some of it has arrived.
            OSError: the disk is full; nothing of the record was kept.
        """
        line = _line(record)
        with self._lock:
            if self._waiting + len(line) > self._limit:
                self._waiting = backlog(self._folder)
                if self._waiting and self._waiting + len(line) > self._limit:
                    raise SpoolFull
            if self._file < 0 or self._size >= self._segment_bytes:
                self._next_segment()
            try:
                write_whole(self._file, line)
            except OSError:
                self._end_segment()  # what is torn stays its end
                raise
            self._size += len(line)
            self._waiting += len(line)

    def close(self) -> None:
        with self._lock:
            self._end_segment()
            self._hold.close()

    def _next_segment(self) -> None:
        self._end_segment()
        path = _segment(self._folder, self._number + 1)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o644)
        self._number, self._size = self._number + 1, 0

    def _end_segment(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class SpoolReader:
    """The delivering end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        first = min(_segments(folder), default=0)
        self.applied = max(_applied(folder), Position(first, 0))
        self.damaged = 0  # records whose checksum is wrong: the disk's work

    def read(self, after: Position, limit: int) -> tuple[list[dict[str, Any]], Position]:
        """Up to `limit` records, and the position behind them."""
        found: list[dict[str, Any]] = []
        while True:
            later = [number for number in _segments(self._folder) if number > after.segment]
            # Listed before it is read: a segment that has a successor by then grows no more.
            after = self._read_segment(after, limit, found)
            if len(found) >= limit or not later:
                return found, after
            after = Position(min(later), 0)

    def sync(self) -> None:
        """Make durable what waits."""
        for number in _segments(self._folder):
            descriptor = os.open(_segment(self._folder, number), os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

    def arrived(self, until: Position) -> None:
        """Everything before this position has been delivered."""
        if until == self.applied:
            return
        staged = self._folder / f".{_APPLIED}"
        staged.write_text(f"{until.segment} {until.offset}")
        staged.replace(self._folder / _APPLIED)  # not made durable: an older watermark delivers again, no more
        self.applied = until
        self._remove(before=until.segment)

    def forget(self) -> None:
        """Remove what has arrived; nothing where somebody appends: the next life of a job that was killed may."""
        if not has_writer(self._folder) and backlog(self._folder) == 0:
            self._remove(before=self.applied.segment + 1)

    def _remove(self, *, before: int) -> None:
        for number in _segments(self._folder):
            if number < before:
                _segment(self._folder, number).unlink(missing_ok=True)

    def _read_segment(self, after: Position, limit: int, found: list[dict[str, Any]]) -> Position:
        path, offset = _segment(self._folder, after.segment), after.offset
        if not path.exists():
            return after
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if len(found) >= limit or not line.endswith(b"\n"):
                    break
                offset += len(line)
                record = _record(line)
                if record is None:
                    self.damaged += 1
                else:
                    found.append(record)
        return Position(after.segment, offset)


def backlog(folder: Path) -> int:
    """Bytes of records that have not arrived."""
    applied, waiting = _applied(folder), 0
    for number in _segments(folder):
        try:
            size = _segment(folder, number).stat().st_size
        except FileNotFoundError:
            continue  # delivered meanwhile
        if number > applied.segment:
            waiting += size
        elif number == applied.segment:
            waiting += max(0, size - applied.offset)
    return waiting


def has_writer(folder: Path) -> bool:
    """Whether a living process appends to this folder."""
    try:
        with (folder / _WRITER).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _hold_writer(folder: Path) -> Any:
    lock = (folder / _WRITER).open("ab")
    for _ in range(10):  # `has_writer` of another process holds it for a moment
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            time.sleep(0.05)
    lock.close()
    raise TrackingError("another process tracks this run", where=str(folder), fix="wait for it, or stop it")


def _segment(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.records"


def _segments(folder: Path) -> list[int]:
    return sorted(int(name[:-8]) for name in os.listdir(folder) if name.endswith(".records"))


def _applied(folder: Path) -> Position:
    try:
        segment, offset = (folder / _APPLIED).read_text().split()
        return Position(int(segment), int(offset))
    except (FileNotFoundError, ValueError):
        return Position(0, 0)


def _line(record: dict[str, Any]) -> bytes:
    body = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a line, or None where it is damaged."""
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    try:
        return json.loads(body) if int(checksum, 16) == zlib.crc32(body) else None
    except ValueError:
        return None

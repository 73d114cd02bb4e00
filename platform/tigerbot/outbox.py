"""An append-only file of records, one JSON object a line: what was said is there for every later process.

A record survives the death of its process when `append` returns, and the death of the machine 50 ms later: a thread
makes the file durable in the background, for all records of that moment at once. This module knows nothing about
MLflow.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SYNC_EVERY_S = 0.05
_BLOCK = 64 * 1024


class Outbox:
    """Records of one file. One process writes at a time; its threads may share the object."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.Lock()
        self._file = path.open("ab+", buffering=0)
        self._whole = _cut_torn_record(self._file.fileno())
        self._said = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def append(self, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            OSError: the disk is full; nothing of the record was kept.
        """
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n"
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._sync, daemon=True, name=f"sync {self.path.name}")
                self._thread.start()
            try:
                write_whole(self._file.fileno(), line)
            except OSError:
                os.ftruncate(self._file.fileno(), self._whole)
                raise
            self._whole += len(line)
        self._said.set()

    def records(self) -> Iterator[dict[str, Any]]:
        """Every record ever appended."""
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)

    def close(self) -> None:
        self._closing.set()
        self._said.set()
        if self._thread is not None:
            self._thread.join()
        self._file.close()

    def _sync(self) -> None:
        while not self._closing.is_set():
            self._said.wait()
            self._closing.wait(_SYNC_EVERY_S)
            self._said.clear()
            os.fdatasync(self._file.fileno())


def write_whole(descriptor: int, data: bytes) -> None:
    """All of `data`, or an error: a disk that fills up takes a part first."""
    while data:
        data = data[os.write(descriptor, data) :]


def _cut_torn_record(descriptor: int) -> int:
    """Remove the half line that a kill in the middle of a write left: the next record would be glued to it."""
    size = whole = os.fstat(descriptor).st_size
    while whole:
        begin = max(0, whole - _BLOCK)
        found = os.pread(descriptor, whole - begin, begin).rfind(b"\n")
        if found >= 0:
            whole = begin + found + 1
            break
        whole = begin
    if whole < size:
        os.ftruncate(descriptor, whole)
    return whole

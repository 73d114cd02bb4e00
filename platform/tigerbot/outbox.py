"""An append-only file of records and a watermark: what was said, and how much of it has arrived.

A record is one JSON line. Whoever delivers records reads them from the watermark, delivers, and moves the watermark:
a death in between delivers some again, so delivery must be idempotent. This module knows nothing about MLflow.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tigerbot.runs import write_text


class Outbox:
    """Records of one file. One process writes at a time; its threads may share the object.

    Args:
        path: the file; `<path>.applied` beside it holds the watermark, in bytes.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._mark = path.with_name(path.name + ".applied")
        self._lock = threading.Lock()
        self._file = path.open("ab+")
        self._cut_torn_record()
        self._applied = self._read_mark()

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; it survives the death of this process from here on."""
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()

    def records(self) -> Iterator[dict[str, Any]]:
        """Every record ever appended."""
        with self.path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)

    def waiting(self, limit: int) -> tuple[list[dict[str, Any]], int]:
        """Up to `limit` records that have not arrived, and the watermark once they have."""
        found, end = [], self._applied
        with self.path.open("rb") as file:
            file.seek(self._applied)
            for line in file:
                if len(found) == limit or not line.endswith(b"\n"):
                    break
                found.append(json.loads(line))
                end += len(line)
        return found, end

    def arrived(self, until: int) -> None:
        """Everything before this watermark has been delivered."""
        write_text(self._mark, str(until))
        self._applied = until

    @property
    def empty(self) -> bool:
        """Whether everything has arrived."""
        return self._applied >= self.path.stat().st_size

    def close(self) -> None:
        with self._lock:
            if not self._file.closed:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()

    def _cut_torn_record(self) -> None:
        # A kill in the middle of a write leaves half a line, which the next record would be glued to.
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)

    def _read_mark(self) -> int:
        try:
            return min(int(self._mark.read_text()), self.path.stat().st_size)
        except (FileNotFoundError, ValueError):
            return 0

"""`metrics.jsonl`: what a run says about itself, one JSON line a step, written by the driver as rank 0 says it.

A resumed run writes the steps since its checkpoint again, so a reader lets the last line of a step win.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, float]


def append_row(path: Path, row: Row) -> None:
    # NaN is not JSON: a value that is not finite is written as null.
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Rows by step, the last one of each."""
    if not path.exists():
        return []
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = _parsed(line)
        if row:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


class Follower:
    """Calls back with every row of another process' run, the ones that are there already too, from a thread of its own.

    A driver that was killed may have left rows that it had not read: its successor begins at the beginning, and whoever
    listens ignores the steps it knows.
    """

    def __init__(self, path: Path, on_row: Callable[[Row], None], *, poll_s: float = 0.3) -> None:
        path.touch()
        self._path, self._on_row, self._poll_s = path, on_row, poll_s
        self._offset = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True, name="metrics")
        self._thread.start()

    def close(self) -> None:
        """Give the rows that are left, and stop."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(self._poll_s):
            self._read()
        self._read()

    def _read(self) -> None:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                row = _parsed(line.decode())
                if row:
                    self._on_row(row)


def _parsed(line: str) -> Row | None:
    try:
        raw: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None  # cut off by a kill; the step is written again
    return {name: math.nan if value is None else value for name, value in raw.items()}

"""`trials.jsonl`: everything that happened in a sweep, one line each, in the order in which it did.

The sweep's own memory, which outlives its driver; `course.py` says what it means. A line survives the death of its
process as soon as it is written.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tigerbot.errors import CorruptError
from tigerbot.outbox import Outbox

Record = dict[str, Any]
JOURNAL = "trials.jsonl"


class Journal:
    """One process writes.

    Args:
        folder: the run's.
        now: the clock.
    """

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        self._outbox = Outbox(folder / JOURNAL)
        self._now = now
        self.driver = secrets.token_hex(4)

    def records(self) -> Iterator[Record]:
        """Every record so far.

        Raises:
            CorruptError: a line in the middle is none.
        """
        try:
            yield from self._outbox.records()
        except json.JSONDecodeError as error:
            raise CorruptError(
                f"holds a line that is none ({error.msg})", where=str(self._outbox.path), fix="--replace to begin anew"
            ) from None

    def write(self, event: str, **about: Any) -> Record:
        """Append a record; returns it as it will be read again."""
        record = {"event": event, **about, "t": round(self._now(), 3)}
        self._outbox.append(record)
        return record

    def close(self) -> None:
        self._outbox.close()


def finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics as JSON has them: it knows no number that is none."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}

"""Why a trial failed, and whether it is tried again.

A node that is lost is nobody's fault: always. A process that died on a living node: a few times. Memory: once, with half
the micro batch and twice the accumulation. What failed by itself fails again: never. This module decides; it starts
nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

from tigerbot.errors import InputError

Cause = Literal["", "node", "process", "memory", "bug", "nan", "deadline", "input", "budget"]
_TRIES: dict[str, float] = {"node": float("inf"), "process": 3, "memory": 1}
_MEMORY = re.compile(r"out of memory|cannot allocate memory|bad_alloc|can't allocate memory", re.IGNORECASE)


def cause_of(error: BaseException) -> Cause:
    """Of an exception that a trial raised."""
    if isinstance(error, InputError):
        return "input"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _MEMORY.search(str(error)):
        return "memory"
    return "bug"


def is_retried(cause: str, retried: Counter[str], *, can_shrink: bool) -> bool:
    """Whether a trial that failed so begins again; `can_shrink`: there is a micro batch to halve."""
    if cause == "memory" and not can_shrink:
        return False
    return retried[cause] < _TRIES.get(cause, 0)


def described(error: BaseException) -> str:
    """What an exception says, in one line that names its kind."""
    said = next((line for line in str(error).strip().splitlines() if line.strip()), "")
    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {said}".rstrip(": ")
    return text if len(text) <= 300 else text[:297] + "..."


class SameFailure:
    """Whether every trial so far failed in the same way: then the next would too.

    Args:
        limit: failures that are enough to say so.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._first, self.count, self._open = limit, "", 0, True

    def ended(self, status: str, error: str) -> bool:
        """Told of every end; True when it is time to stop."""
        if not self._open:
            return False
        alike = _shape(error)
        if status != "failed" or (self._first and alike != self._first):
            self._open = False
            return False
        self._first, self.count = alike, self.count + 1
        return self.count >= self._limit


def _shape(error: str) -> str:
    """An error without what differs from trial to trial: numbers, addresses, quoted values."""
    return re.sub(r"0x[0-9a-f]+|[-+]?\d[\d.e+-]*|'[^']*'|\"[^\"]*\"", "#", error)

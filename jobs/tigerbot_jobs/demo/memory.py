"""Peak memory of this process and all it started, in proportional set size, so that shared pages count once."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Samples every few seconds between enter and exit."""

    def __init__(self, every_s: float = 5.0) -> None:
        self._every_s = every_s
        self._peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="peak-memory")

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def gib(self) -> float:
        """The peak so far, in GiB."""
        self._peak = max(self._peak, tree_bytes())
        return self._peak / 2**30

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self._peak = max(self._peak, tree_bytes())


def tree_bytes() -> int:
    """Bytes held by this process and its descendants now."""
    me = psutil.Process()
    return sum(_pss(process) for process in [me, *me.children(recursive=True)])


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0

"""Notices that a node is about to go: from the cloud (a file), the system (SIGTERM), Ray (a draining node).

Each becomes one `Notice`. What is done in the time that is left is not decided here.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

FILE_VARIABLE = "TIGER_PREEMPTION_FILE"
ASSUMED_S = 120.0  # when a notice names no time: what Ray Train assumes, and what spot instances give
_SOON_S = 1e8  # a number below is seconds from now, above a date


@dataclass(frozen=True)
class Notice:
    """A node will go.

    Args:
        deadline_s: seconds left when it was read.
        source: file, sigterm or ray.
    """

    node: str
    deadline_s: float
    source: Literal["file", "sigterm", "ray"]
    evidence: str


class NoticeFile:
    """A file that appears when the cloud takes the machine back.

    It may be empty, or hold a deadline as JSON: seconds from its writing, a Unix time, or an object with one of them
    under `deadline`, `deadline_s` or `time`.

    Args:
        path: by default what TIGER_PREEMPTION_FILE names; without either there is never a notice.
        clock: wall seconds.
    """

    def __init__(self, node: str, path: str | Path | None = None, *, clock: Callable[[], float] = time.time) -> None:
        named = path or os.environ.get(FILE_VARIABLE)
        self._path, self._node, self._clock = Path(named) if named else None, node, clock

    def read(self) -> Notice | None:
        """The notice, while there is one."""
        if self._path is None:
            return None
        try:
            written, text = self._path.stat().st_mtime, self._path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        deadline = _deadline(text, written)
        left = max(0.0, deadline - self._clock())
        return Notice(self._node, left, "file", f"{self._path} says this node goes in {left:.0f} s")


class SigtermNotice:
    """SIGTERM as a notice: the handler only notes the time, then calls the handler that was there before.

    Install it from the main thread, after whatever else wants the signal.

    Args:
        grace_s: seconds until SIGKILL follows.
        replace: do not call the earlier handler (Ray's leaves at once, which would end the grace).
        clock: monotonic seconds.
    """

    def __init__(
        self, node: str, *, grace_s: float, replace: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._node, self._grace_s, self._replace, self._clock = node, grace_s, replace, clock
        self._at: float | None = None
        self._before: Any = None

    def install(self) -> None:
        """Handle SIGTERM from now on."""
        self._before = signal.signal(signal.SIGTERM, self._handle)

    def uninstall(self) -> None:
        """Put the earlier handler back."""
        signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)

    def read(self) -> Notice | None:
        """The notice, once the signal has come."""
        if self._at is None:
            return None
        left = max(0.0, self._at + self._grace_s - self._clock())
        return Notice(self._node, left, "sigterm", f"SIGTERM came, {left:.0f} s of {self._grace_s:g} s are left")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._at is None:
            self._at = self._clock()
        if callable(self._before) and not self._replace:
            self._before(number, frame)


def draining_nodes(*, clock: Callable[[], float] = time.time) -> dict[str, float]:
    """Ray's nodes that are being drained: node id (hex) -> seconds left.

    Ray is asked as Ray Train's own preemption watcher asks it (`ray/train/v2/_internal/execution/preemption.py`, 2.60),
    since with replica groups that watcher is off.
    """
    import ray

    drained = ray._private.state.state.get_draining_nodes()  # type: ignore[attr-defined]
    now = clock()
    # Milliseconds of Unix time; 0 when no deadline was given.
    return {node: max(0.0, until / 1000 - now) if until else ASSUMED_S for node, until in drained.items()}


def drain_notices(draining: dict[str, float], ours: Iterable[str]) -> list[Notice]:
    """Notices for those of our nodes that drain; the least time first."""
    found = [
        Notice(node, draining[node], "ray", f"Ray drains node {node[:8]}, {draining[node]:.0f} s are left")
        for node in set(ours) & draining.keys()
    ]
    return sorted(found, key=lambda notice: (notice.deadline_s, notice.node))


def _deadline(text: str, written: float) -> float:
    """Unix time of the deadline a notice file names; anything unreadable counts as named without a time."""
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if isinstance(said, dict):
        said = next((said[key] for key in ("deadline", "deadline_s", "time") if key in said), None)
    if not isinstance(said, (int, float)) or isinstance(said, bool):
        return written + ASSUMED_S
    return said if said > _SOON_S else written + said

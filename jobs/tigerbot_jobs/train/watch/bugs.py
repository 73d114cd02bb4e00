"""What a failure was: a bug that comes back, a batch that breaks, or a peer that went away.

A restart cures a lost machine and never a bug: the same exception at the same place and step, with nothing done in
between, ends the run with one line. That a survivor's collective failed says nothing about its own code, so
communication errors are told apart first.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

MAX_RESTARTS = 5
_OURS = ("tigerbot", "tigerbot_jobs", "tigerbot_serve")

# What torch's own communication code raises, by name: torch is not imported here.
_COMMUNICATION_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
# gloo and autograd around it raise plain RuntimeErrors. The first line is gloo's, for killed, stopped and cut-off
# peers; a text that a disk or an HTTP client could say as well is not here.
_COMMUNICATION_TEXT = re.compile(
    r"gloo/transport|timed out waiting \d+ ?ms|connection (closed|reset) by peer|monitoredBarrier"
    r"|\bnccl\b.*\b(error|timeout|timed out|abort|fail)|nccl(Internal|System|Remote|UnhandledCuda)Error"
    r"|watchdog caught collective operation timeout|process ?group .*(abort|shut ?down)",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class BugKey:
    """What makes two failures the same: the exception's type, where in our code, at which step."""

    exception: str
    frame: str
    step: int


@dataclass(frozen=True)
class Judgement:
    """What to do after a failure."""

    action: Literal["restart", "quarantine", "stop"]
    evidence: str


class BugMemory:
    """Remembers a run's failures over its restarts.

    Args:
        max_restarts: in a row without the run getting further, whatever they were for.
    """

    def __init__(self, *, max_restarts: int = MAX_RESTARTS) -> None:
        self._max_restarts = max_restarts
        self._last: BugKey | None = None
        self._failed_batches: list[int] = []
        self._quarantined: list[int] = []
        self._furthest, self._stuck = -1, 0

    def failed(
        self, key: BugKey | None, *, batch: int | None, steps_since: int, furthest: int, line: str = ""
    ) -> Judgement:
        """Judge a failure.

        Args:
            key: None for a killed, hung or lost worker, and for a communication error.
            batch: global batch the failing step was at; None where it is not known.
            steps_since: steps done since the failure before this one, done again or new.
            furthest: the most optimizer steps the run ever had done.
            line: what `describe` said.
        """
        self._stuck = self._stuck + 1 if furthest <= self._furthest else 0
        self._furthest = max(furthest, self._furthest)
        if key is not None:
            judged = self._same_again(key, batch, steps_since, line)
            self._last = key
            if judged is not None:
                return judged
        if self._stuck >= self._max_restarts:
            text = f"{self._stuck} restarts and the run is still at step {self._furthest}"
            return Judgement("stop", f"{text}: the last failure was {line}" if line else text)
        return Judgement("restart", line or "a worker was lost")

    def _same_again(self, key: BugKey, batch: int | None, steps_since: int, line: str) -> Judgement | None:
        what = line or f"{key.exception} at {key.frame}"
        if key == self._last and steps_since == 0:
            return Judgement("stop", f"twice at step {key.step} with nothing done in between, so it is a bug: {what}")
        if batch is None:
            return None
        if batch in self._failed_batches:
            self._failed_batches.remove(batch)
            self._quarantined.append(batch)
            return Judgement("quarantine", f"global batch {batch} failed twice with other steps between: {what}")
        if key == self._last and self._quarantined:
            text = f"step {key.step} fails with another batch too (batch {self._quarantined[-1]} is skipped)"
            return Judgement("stop", f"{text}, so it is a bug: {what}")
        self._failed_batches.append(batch)
        return None

    def state(self) -> dict[str, Any]:
        """As JSON, to outlive this process."""
        return {
            "last": asdict(self._last) if self._last else None,
            "failed_batches": self._failed_batches,
            "quarantined": self._quarantined,
            "furthest": self._furthest,
            "stuck": self._stuck,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self._last = BugKey(**state["last"]) if state["last"] else None
        self._failed_batches, self._quarantined = list(state["failed_batches"]), list(state["quarantined"])
        self._furthest, self._stuck = state["furthest"], state["stuck"]


def describe(error: BaseException, *, step: int) -> tuple[BugKey, str]:
    """The key of an exception, and one line for a person: type, message, place."""
    root = _root(error)
    frame = _frame(root)
    words = " ".join(str(root).split())
    kind = type(root).__name__
    return BugKey(
        kind, frame, step
    ), f"{kind}: {words[:300]} ({frame}, step {step})" if words else f"{kind} ({frame}, step {step})"


def is_communication_error(error: BaseException) -> bool:
    """A peer or the network between went away; this process's own code is not at fault."""
    return any(
        type(one).__name__ in _COMMUNICATION_TYPES
        or (type(one) is RuntimeError and _COMMUNICATION_TEXT.search(str(one)) is not None)
        for one in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and what it was raised from; Ray keeps what a task raised in `cause`."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        cause = getattr(error, "cause", None)
        error = error.__cause__ or (cause if isinstance(cause, BaseException) else None)


def _root(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _frame(error: BaseException) -> str:
    """`file:function`, innermost of our code's, else innermost of all. No line: a log line added above changes it."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "unknown"
    ours = [frame for frame in frames if set(Path(frame.filename).parts) & set(_OURS)]
    frame = (ours or list(frames))[-1]
    parts = Path(frame.filename).parts
    begin = next((index for index, part in enumerate(parts) if part in _OURS), len(parts) - 1)
    return f"{'/'.join(parts[begin:])}:{frame.name}"

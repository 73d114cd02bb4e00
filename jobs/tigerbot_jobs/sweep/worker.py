"""A process that runs one trial after another, each in a thread, and speaks with the driver while it does.

The driver keeps one call to `exchange` open: it hands in a task, an answer or nothing, and gets what the trial has said
since. A trial that says more than the driver takes waits (`_HELD` events are held). Where the scheduler may decide, and
at a value that is no number, `report` waits for the answer, and a trial that is stopped leaves it by `Stopped`.

Everything the trial kept or reported leaves in the order in which it said so: a state never overtakes the points before
it, so a driver that writes them down in that order can resume from that state without losing a point.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tigerbot_jobs.sweep.failures import Cause, cause_of, described
from tigerbot_jobs.sweep.schedulers import NEVER
from tigerbot_jobs.sweep.trials import numbers

_HELD = 256
_GATHER_S = 0.02  # points that nobody waits for go together
_PRINTED = 1_000_000  # characters of a trial's output that are kept


class Stopped(BaseException):
    """Raised out of `report` in a trial that is not to go on. No `except Exception` of a target swallows it."""


@dataclass(frozen=True)
class Task:
    """A trial to run. `state` is what an earlier attempt kept last; `decide_at` the first step to wait for an answer at."""

    name: str
    params: dict[str, Any]
    seed: int
    metric: str
    state: bytes | None
    decide_at: int
    output: Path


@dataclass(frozen=True)
class Answer:
    """To a point that was waited for."""

    go_on: bool
    decide_at: int = NEVER


@dataclass(frozen=True)
class Point:
    step: int
    metrics: dict[str, float]
    waits: bool


@dataclass(frozen=True)
class Kept:
    state: bytes


@dataclass(frozen=True)
class Ended:
    """`backwards` counts the reports whose step was none after the last one: they were left out."""

    stopped: bool
    error: str = ""
    cause: Cause = ""
    backwards: int = 0


Event = Point | Kept | Ended


class Report:
    """What a target is given to speak with: `report({"loss": 0.3, "step": 7})`.

    Attributes:
        kept: what an earlier attempt of this trial (or, in a population, the one it takes over from) kept last.
        seed: of this trial among its configuration's.
        name: the trial's.
    """

    def __init__(self, task: Task, say: Callable[[Event], None], answer: Callable[[], Answer]) -> None:
        self.kept, self.seed, self.name = task.state, task.seed, task.name
        self._metric, self._decide_at = task.metric, task.decide_at
        self._say, self._answer = say, answer
        self._step, self.backwards = -1, 0
        self.stopped = threading.Event()

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        """Report a step. Without `step` it is one after the last.

        Raises:
            Stopped: the trial is not to go on.
        """
        if self.stopped.is_set():
            raise Stopped
        step = int(metrics.get("step", max(self._step, 0) + 1))
        if step <= self._step:
            self.backwards += 1
            return
        self._step = step
        found = numbers({name: value for name, value in metrics.items() if name != "step"})
        value = found.get(self._metric)
        waits = value is not None and (step >= self._decide_at or not math.isfinite(value))
        self._say(Point(step, found, waits))
        if waits:
            answer = self._answer()
            self._decide_at = answer.decide_at
            if not answer.go_on:
                self.stopped.set()
                raise Stopped

    def keep(self, state: bytes) -> None:
        """Keep what the trial can be resumed from; after the report of that step."""
        self._say(Kept(state))


class Worker:
    """The actor.

    Args:
        target: a picklable callable `(params, report)`.
    """

    def __init__(self, target: Any) -> None:
        self._target = target
        self._events: queue.Queue[Event] = queue.Queue(_HELD)
        self._answers: queue.Queue[Answer] = queue.Queue(1)

    def node(self) -> str:
        """The node this is on."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def exchange(self, message: Task | Answer | None, timeout_s: float) -> list[Event]:
        """Take a message; return what was said, as soon as something was, at the latest after `timeout_s`."""
        if isinstance(message, Task):
            threading.Thread(target=self._run, args=(message,), daemon=True, name=message.name).start()
        elif isinstance(message, Answer):
            self._answers.put(message)
        try:
            events = [self._events.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        until = time.monotonic() + _GATHER_S
        while not _is_urgent(events[-1]) and len(events) < _HELD:
            try:
                events.append(self._events.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                break
        return events

    def _run(self, task: Task) -> None:
        report = Report(task, self._events.put, self._answers.get)
        _seed_everything(f"{task.seed}/{task.name}")
        ended = Ended(stopped=False)
        with _Printed(task.output):
            try:
                self._target(task.params, report)
            except Stopped:
                ended = Ended(stopped=True)
            except BaseException as error:  # also SystemExit: a trial must not end the worker
                _print_traceback()
                ended = Ended(stopped=False, error=described(error), cause=cause_of(error))
        if report.stopped.is_set():  # a target that swallows it, or hears of it another way
            ended = Ended(stopped=True)
        self._events.put(Ended(ended.stopped, ended.error, ended.cause, report.backwards))


def _is_urgent(event: Event) -> bool:
    return isinstance(event, Ended) or (isinstance(event, Point) and event.waits)


def _seed_everything(text: str) -> None:
    """What earlier trials of this process drew does not show."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    random.seed(seed)
    for name, seeder in (("numpy", lambda m: m.random.seed(seed)), ("torch", lambda m: m.manual_seed(seed))):
        if name in sys.modules:
            seeder(sys.modules[name])


def _print_traceback() -> None:
    import traceback

    traceback.print_exc()


class _Printed(io.TextIOBase):
    """What a trial prints, in a file of its own that is cut off at a megabyte; no file where it prints nothing.

    A full disk, or a node without the sweep's folder, is not the trial's concern: what has no place is left out.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, 0
        self._file: Any = None
        self._redirects = contextlib.ExitStack()

    def __enter__(self) -> _Printed:
        self._redirects.enter_context(contextlib.redirect_stdout(self))
        self._redirects.enter_context(contextlib.redirect_stderr(self))
        return self

    def __exit__(self, *_: Any) -> None:
        self._redirects.close()
        if self._size > _PRINTED:
            self._keep(f"\n... {self._size - _PRINTED:,} more characters were left out\n")
        self._close()

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        left = _PRINTED - self._size
        self._size += len(text)
        if left > 0:
            self._keep(text[:left])
        return len(text)

    def flush(self) -> None:
        if self._file is not None and not self._file.closed:
            with contextlib.suppress(OSError):
                self._file.flush()

    def _keep(self, text: str) -> None:
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("w", encoding="utf-8", errors="replace")
            self._file.write(text)
        except OSError:
            self._close()
            self._file = io.StringIO()

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

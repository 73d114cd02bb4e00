"""Workers that outlive a run: one group of Ray Train's that takes up one run after another, each with its own hub.

Starting Ray Train and importing torch and DeepSpeed takes far longer than a short run's first step; here that is paid
once. Who hires the group listens. Every worker holds a line to it, is handed the job of the run there is, lives under
that run's hub until it says stop, and says that it is back. A worker that replaces a dead one is handed the same job.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import socket
import threading
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tigerbot_jobs.train.given import WorkerJob, job_to
from tigerbot_jobs.train.recovery.backend import Workers
from tigerbot_jobs.train.recovery.entry import Place, stand
from tigerbot_jobs.train.recovery.messages import Back, Hello, Take
from tigerbot_jobs.train.recovery.wire import decode, encode

_HELLO_S = 10.0
_BACK_S = 10.0  # a step may be under way in each


class Staff(Protocol):
    """The workers of one run, for whoever supervises it."""

    @property
    def error(self) -> Exception | None:
        """Why there are none any more."""
        ...

    @property
    def ended(self) -> bool:
        """Whether there will be none any more."""
        ...

    def end(self, timeout_s: float) -> None:
        """The run is over."""
        ...


class Standing:
    """A group of workers for one run after another, and for no two at once.

    Args:
        folder: for what Ray Train writes.
        host: that the group's workers reach this process at.
    """

    def __init__(self, folder: Path, host: str) -> None:
        self._folder, self._host = folder, host
        self._group: _Group | None = None

    def hire(self, job: WorkerJob, count: int, environment: dict[str, str]) -> Staff:
        """The workers for a job: those there are if they are such as it wants, else new ones."""
        shape = _shape(job, count, environment)
        if self._group is not None and (self._group.shape != shape or self._group.ended):
            self.close()
        if self._group is None:
            self._group = _Group(job, count, environment, self._folder, self._host)
        self._group.desk.give(job)
        return self._group

    def close(self) -> None:
        """End the workers; the next job finds new ones."""
        if self._group is not None:
            self._group.close()
            self._group = None


class _Group:
    """One group; to a run, its staff."""

    def __init__(self, job: WorkerJob, count: int, environment: dict[str, str], folder: Path, host: str) -> None:
        self.shape = _shape(job, count, environment)
        self.desk = Desk(host)
        name = f"workers-{secrets.token_hex(4)}"
        self._workers = Workers(stand, self.desk.place, job.spec.scale, folder, count, environment, name=name)

    @property
    def error(self) -> Exception | None:
        return self._workers.error

    @property
    def ended(self) -> bool:
        return self._workers.ended

    def end(self, timeout_s: float) -> None:
        if not self.desk.take_back(max(timeout_s, _BACK_S)):
            self.close()  # somebody is stuck: the next job finds new ones

    def close(self) -> None:
        self.desk.close()
        self._workers.end(5)


def _shape(job: WorkerJob, count: int, environment: dict[str, str]) -> tuple[Any, ...]:
    """What makes workers fit for a job, beside their processes: what they have set for good."""
    spec = job.spec
    return count, environment, job.threads, spec.scale, spec.train.precision, spec.deepspeed


class Desk:
    """Hands the job there is to every worker that holds a line, and knows who is not back from it."""

    def __init__(self, host: str) -> None:
        self._server = socket.create_server((host, 0))
        self.place = Place(f"{host}:{self._server.getsockname()[1]}", secrets.token_hex(16))
        self._lines: set[socket.socket] = set()
        self._out: set[socket.socket] = set()
        self._job = b""
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, daemon=True, name="desk").start()

    def give(self, job: WorkerJob) -> None:
        """From now on this is the job."""
        with self._changed:
            self._job = encode(Take(job_to(job)))
            for line in self._lines:
                self._hand(line)

    def take_back(self, timeout_s: float) -> bool:
        """There is no job any more; whether everybody who has it is back, or gone, in time."""
        with self._changed:
            self._job = b""
            return self._changed.wait_for(lambda: not self._out, timeout_s)

    def close(self) -> None:
        """Tell everybody that no job comes any more."""
        with self._changed:
            for one in (self._server, *self._lines):
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)  # ends the waiting in `accept`, which closing does not
        self._server.close()

    def _hand(self, line: socket.socket) -> None:
        self._out.add(line)
        with contextlib.suppress(OSError):  # it has died: its own thread notices
            line.sendall(self._job)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(line,), daemon=True, name="desk-line").start()

    def _serve(self, line: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), line, line.makefile("rb") as said:
            line.settimeout(_HELLO_S)
            hello = decode(said.readline())
            if not isinstance(hello, Hello) or not hmac.compare_digest(hello.token, self.place.token):
                return
            line.settimeout(None)
            with self._changed:
                self._lines.add(line)
                if self._job:
                    self._hand(line)
            try:
                self._hear(line, said)
            finally:
                with self._changed:
                    self._lines.discard(line)
                    self._back(line)

    def _hear(self, line: socket.socket, said: BinaryIO) -> None:
        for text in said:
            if isinstance(decode(text), Back):
                with self._changed:
                    self._back(line)

    def _back(self, line: socket.socket) -> None:
        self._out.discard(line)
        self._changed.notify_all()

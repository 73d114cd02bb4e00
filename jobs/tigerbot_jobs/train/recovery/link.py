"""A worker's line to the hub: orders come in, heartbeats and rows go out, from two threads beside the training.

The main thread only sets what it is doing (`phase`), which costs less than a microsecond. When the hub calls a
generation off, or is gone, the reading thread breaks the main thread out of its collective.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tigerbot.errors import ClusterError
from tigerbot_jobs.train.recovery.messages import (
    Abort,
    Form,
    Hello,
    Meet,
    Message,
    Pause,
    Probe,
    Pulse,
    Save,
    Say,
    Stop,
)
from tigerbot_jobs.train.recovery.wire import decode, encode

BEAT_S = 0.25
HUB_GONE = "the hub is gone"
_CONNECT_S = 30.0
_SILENT_S = 30.0  # heartbeats that nobody acknowledges for so long: this node is cut off, and was given up long ago


@dataclass
class _Doing:
    generation: int = 0
    rank: int = -1
    step: int = 0
    phase: str = "idle"
    since: float = field(default_factory=time.monotonic)
    seq: int = 0


class Link:
    """The connection of one process (a worker or a keeper) to the hub.

    Args:
        address: host:port of the hub.
        hello: what it says first.
        on_message: of everything that is not an order to this worker; called from the reading thread.
        patience_s: how long to try.
    """

    def __init__(
        self,
        address: str,
        hello: Hello,
        on_message: Callable[[Message], None] | None = None,
        *,
        patience_s: float = _CONNECT_S,
    ) -> None:
        self._hello, self._on_message = hello, on_message
        self._doing = _Doing()
        self._orders: queue.Queue[Form | Stop] = queue.Queue()
        self._meeting: queue.Queue[Meet] = queue.Queue()
        self._lock = threading.Lock()
        self._steps: list[list[float]] = []
        self._own: list[list[float]] = []
        self._rows: list[dict[str, Any]] = []
        self._over = 0  # generations up to this one are over
        self._pause = 0
        self._save = self._probe = 0
        self._break: Callable[[], None] | None = None
        self._closed = threading.Event()
        host, _, port = address.rpartition(":")
        self._socket = _connected(host, int(port), patience_s)
        self.send(hello)
        threading.Thread(target=self._read, daemon=True, name="hub-reader").start()
        threading.Thread(target=self._beat, daemon=True, name="hub-beat").start()

    # What the main thread does.

    def order(self) -> Form | Stop:
        """Wait for what to do next."""
        return self._orders.get()

    def enter(self, form: Form, break_out: Callable[[], None]) -> None:
        """From now on this process acts in a generation; `break_out` ends its collectives from another thread."""
        with self._lock:
            self._steps, self._own, self._rows = [], [], []
        self._doing = _Doing(generation=form.generation, rank=form.rank, step=form.step, phase="form")
        self._break = break_out
        if self._over >= form.generation:
            break_out()

    def leave(self) -> None:
        self._break = None
        self._doing = _Doing(generation=self._doing.generation, step=self._doing.step)

    def phase(self, phase: str, step: int | None = None) -> None:
        """Say what this rank does now; for the heartbeat."""
        doing = self._doing
        doing.phase, doing.since = phase, time.monotonic()
        doing.step = doing.step if step is None else step
        doing.seq += 1

    def meet(self, generation: int, timeout_s: float) -> str:
        """Where rank 0 of this generation waits.

        Raises:
            RuntimeError: the generation was called off meanwhile.
        """
        until = time.monotonic() + timeout_s
        while time.monotonic() < until and self._over < generation:
            with contextlib.suppress(queue.Empty):
                found = self._meeting.get(timeout=0.02)
                if found.generation == generation:
                    return found.address
        raise RuntimeError("Connection closed by peer: the generation was called off before it met")

    def paused(self, generation: int) -> bool:
        """Whether the hub wants this generation to leave at the next step boundary."""
        return self._pause >= generation

    def save_wanted(self, generation: int) -> bool:
        """Whether the hub wants the next snapshot in storage; asked once, answered once."""
        wanted, self._save = self._save == generation, 0
        return wanted

    def probe_wanted(self, generation: int) -> bool:
        """Whether the hub wants this rank's speed measured; asked once, answered once."""
        wanted, self._probe = self._probe == generation, 0
        return wanted

    def over(self, generation: int) -> bool:
        return self._over >= generation

    def step_done(self, row: list[float], own_s: float) -> None:
        """Ledger row of a step, for the next heartbeat."""
        with self._lock:
            if self._doing.rank == 0:
                self._steps.append(row)
            self._own.append([row[0], own_s])

    def log(self, row: dict[str, Any]) -> None:
        """A metrics row, for the next heartbeat."""
        with self._lock:
            self._rows.append(row)

    def say(self, kind: str, **about: Any) -> None:
        """An event for the ledger."""
        self.send(Say(kind, about))

    def send(self, message: Message) -> None:
        """Send now; a hub that is gone is noticed by the reading thread."""
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(encode(message))

    def flush(self) -> None:
        """Send what waits for the next heartbeat."""
        self._pulse()

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    # What the two threads do.

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("rb") as lines:
            for line in lines:
                self._take(decode(line))
        if not self._closed.is_set():
            self._end_generations(2**62)
            self._orders.put(Stop(HUB_GONE))
            if self._on_message is not None:
                self._on_message(Stop(HUB_GONE))

    def _take(self, message: Message) -> None:
        if isinstance(message, Form | Stop):
            self._orders.put(message)
            if isinstance(message, Stop):
                self._end_generations(2**62)
        elif isinstance(message, Meet):
            self._meeting.put(message)
        elif isinstance(message, Abort):
            self._end_generations(message.generation)
        elif isinstance(message, Pause):
            self._pause = max(self._pause, message.generation)
        elif isinstance(message, Save):
            self._save = message.generation
        elif isinstance(message, Probe):
            self._probe = message.generation
        if self._on_message is not None:
            self._on_message(message)

    def _end_generations(self, number: int) -> None:
        self._over = max(self._over, number)
        act = self._break
        if act is not None and self._doing.generation <= number:
            act()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT_S):
            self._pulse()

    def _pulse(self) -> None:
        doing = self._doing
        with self._lock:
            steps, self._steps = self._steps, []
            own, self._own = self._own, []
            rows, self._rows = self._rows, []
        times = os.times()
        self.send(
            Pulse(
                generation=doing.generation,
                rank=doing.rank,
                step=doing.step,
                phase=doing.phase,
                seq=doing.seq,
                in_phase_s=round(time.monotonic() - doing.since, 4),
                cpu_s=times.user + times.system,
                steps=steps,
                own=own,
                rows=rows,
            )
        )


def _connected(host: str, port: int, patience_s: float) -> socket.socket:
    until, wait_s = time.monotonic() + patience_s, 0.05
    while True:
        try:
            made = socket.create_connection((host, port), timeout=5)
            made.settimeout(None)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_SILENT_S * 1000))
            return made
        except OSError as error:
            if time.monotonic() > until:
                raise ClusterError(
                    f"the hub cannot be reached ({error})",
                    where=f"{host}:{port}",
                    fix="the driver may be gone; the same command goes on",
                ) from None
            time.sleep(wait_s)
            wait_s = min(1.0, wait_s * 2)


def own_address(hub: str) -> str:
    """This machine's address on the side of the hub."""
    host, _, port = hub.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as probe:
        return probe.getsockname()[0]

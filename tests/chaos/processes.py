"""The processes of a broken cluster: a node's, a driver's, and how all of them end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


class Leashed:
    """A command under leash.py, with everything that comes of it.

    Args:
        command: what to run.
        log: where its output goes, both streams.
        prefix: put before the leash, to start it elsewhere.
        options: of the leash.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str],
        *,
        prefix: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        self.log = log
        leash = [sys.executable, "-I", "-S", str(Path(__file__).with_name("leash.py")), *options]
        self.holder = subprocess.Popen(
            [*prefix, *leash, str(log), *command],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._said: list[str] = []
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        self._begun()

    def _begun(self) -> None:
        """What a kind of command does at once."""

    def processes(self) -> list[psutil.Process]:
        """All of its processes, by the host's ids, the leash left out."""
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.holder.pid).children(recursive=True)
            return [process for process in found if "leash.py" not in command_line(process)]
        return []

    @property
    def ended(self) -> bool:
        """Whether the command itself has."""
        return bool(self._said)

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self, timeout_s: float) -> int:
        """The command's exit status; what it left running goes on.

        Raises:
            AssertionError: it still runs; the message ends with what it said last.
        """
        self._reader.join(timeout_s)
        if not self._said:
            raise AssertionError(f"no end within {timeout_s} s: {self.output()[-3000:]}")
        return int(self._said[0].removeprefix("exited "))

    def end(self) -> None:
        """SIGKILL to everybody at once; then nobody is left."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert self.holder.stdin is not None
        self.holder.stdin.close()
        self.holder.wait(20)

    def _listen(self) -> None:
        assert self.holder.stdout is not None
        if line := self.holder.stdout.readline().strip():
            self._said.append(line)


@dataclass(frozen=True)
class Node:
    """A node of a cluster."""

    name: str
    address: str
    held: Leashed


class Driver(Leashed):
    """A program that uses a cluster."""

    def _begun(self) -> None:
        self._first: psutil.Process | None = None
        # Looked for now, while there is only one: later its orphans would be there too.
        while self._first is None and self._reader.is_alive():
            self._first = next(iter(self.processes()), None)
            time.sleep(0.005)

    @property
    def process(self) -> psutil.Process:
        """The program itself, by the host's process id."""
        if self._first is None:
            raise AssertionError(f"the driver ended at once: {self.output()[-3000:]}")
        return self._first

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)


def command_line(process: psutil.Process) -> str:
    """Its words, or its title where it gave itself one; empty when it is gone."""
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports

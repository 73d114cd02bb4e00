"""Processes that a run keeps going: started again when they end badly, ended with it, their output in a file."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tigerbot.notify import ADDRESS as WEBHOOK

_STOP_S = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass
class Child:
    """A process that is started again when it ends badly: after a second, after two, up to half a minute."""

    name: str
    start: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    again_at: float = 0.0
    over: str = ""  # why it is not started any more

    def poll(self) -> int | None:
        """Its exit status, once, when it has ended."""
        if self.over:
            return None
        if self.process is None:
            if time.monotonic() >= self.again_at:
                self.process = self.start()
            return None
        status = self.process.poll()
        if status is not None:
            self.process = None
            self.failures += status != 0
            self.again_at = time.monotonic() + min(30.0, 2.0 ** min(self.failures - 1, 5))
        return status

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def spawn(words: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """`python -m words`, its output appended to `log`. What it says to a webhook its owner says."""
    inherited = {name: value for name, value in os.environ.items() if name != WEBHOOK}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            env=inherited | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for this process, which then stops them in order; and they end when it is killed.
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def why(status: int) -> str:
    """An exit status in words."""
    return signal.Signals(-status).name if status < 0 else f"exit {status}"


def last_line(log: Path) -> str:
    """The last thing a log says."""
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")

"""A job's end of its courier: start it, start it again where it died, hurry it, end it, and print what it says."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from tigerbot.courier import RECOVERED, WAITING, Order

_CHECK_S = 1.0
_LOG = "courier.log"
_END_S = 20.0  # for the end states of runs, and for a local server that it started


class CourierProcess:
    """The courier of one outbox folder."""

    def __init__(self, folder: Path, order: Order) -> None:
        self._folder, self._order = folder, order
        self.complaint = ""
        self._start()

    @property
    def due(self) -> bool:
        """Whether it was not looked at for a while."""
        return time.monotonic() - self._checked > _CHECK_S

    def keep_alive(self) -> None:
        """Start another one where it died."""
        self._checked = time.monotonic()
        if self._process.poll() is None or self._checked - self._started < _CHECK_S:
            return
        if not self.complaint:
            self._tell(f"the process that talks to MLflow died; starting another ({self._folder / _LOG})")
        self._start()

    def hurry(self) -> None:
        """Have it deliver at once."""
        self._write(b"now\n")

    def end(self, *, patient: bool) -> None:
        """End it: `patient` where it has delivered everything and has only to put things in order."""
        self._write(b"close\n")
        for wait_s, end in ((_END_S if patient else 0.0, self._process.terminate), (5.0, self._process.kill)):
            try:
                self._process.wait(wait_s)
                break
            except subprocess.TimeoutExpired:
                end()
        self._process.wait()
        self._listener.join(timeout=1)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _start(self) -> None:
        self._checked = self._started = time.monotonic()
        with (self._folder / _LOG).open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tigerbot.courier", str(self._folder)],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the job's
            )
        self._write(self._order.to_line())
        self._order = replace(self._order, fresh=False)
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True, name="courier")
        self._listener.start()

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it died: seen by keep_alive
            self._process.stdin.write(line)

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._tell(line.decode().strip())

    def _tell(self, line: str) -> None:
        self.complaint = "" if line.startswith(RECOVERED) else line.removeprefix(WAITING).strip()
        tell(line)


def tell(line: str) -> None:
    """One line for the user, between what the job prints."""
    print(f"  {line}", file=sys.stderr, flush=True)

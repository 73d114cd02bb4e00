"""The process that brings a job's outbox to MLflow, so that the job never waits for a server or shares its time with it.

    python -m tigerbot.courier FOLDER       (its order, a JSON line, comes on its standard input)

It gathers what is said for a second, delivers it, and moves the watermark. A line on its standard input has it deliver
at once, the line `close` ends it when all is delivered. It outlives its job: after `kill -9` it delivers what is left.
Runs that nobody finished are KILLED then. One courier works on a folder at a time, the next one waits for it. What it
has to say to the user are lines on its standard output; the job prints them.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import select
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tigerbot.applier import Applier
from tigerbot.batches import Record
from tigerbot.mlflow_client import why
from tigerbot.mlflow_server import database_trouble
from tigerbot.spool import SpoolReader, has_writer

WAITING, RECOVERED = "MLflow does not take metrics; they wait on disk:", "MLflow has taken what waited"
GATHER_S = 1.0  # a run's points of this long go in one call
_BATCH = 2000  # records
_POLL_S = 0.2
_WAITS_S = (0.2, 5.0)  # between attempts: the first, the longest
_ORPHAN_PATIENCE_S = 20.0  # with a server that does not answer, once the job is gone
_SETTINGS = {
    # A request that MLflow's client repeats by itself may make a second run; ours are repeated after a look.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",  # longer than the server waits for a locked database
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


@dataclass(frozen=True)
class Order:
    """What a courier is told. `job`: what its keys begin with; `fresh`: nothing of it was ever delivered."""

    uri: str
    experiment: str
    job: str
    fresh: bool
    parent: int  # process

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


class _Job:
    """What is known of the process that is served. It is over when it says so or is gone."""

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._listening = True
        self.over = False

    @property
    def gone(self) -> bool:
        return os.getppid() != self._parent

    def listen(self, seconds: float) -> bool:
        """Wait for a word that long; whether there was one."""
        if self.gone:
            self.over = True
        if not self._listening:
            time.sleep(seconds)
            return False
        if not select.select([0], [], [], seconds)[0]:
            return False
        said = os.read(0, 4096)
        self._listening = bool(said)
        self.over = self.over or not said or b"close" in said
        return True


class Courier:
    """Delivers until its job is over."""

    def __init__(self, folder: Path, order: Order, say: Callable[[str], None]) -> None:
        self._folder, self._say, self._fresh, self._uri = folder, say, order.fresh, order.uri
        self._job = _Job(order.parent)
        self._reader = SpoolReader(folder)
        self._end = self._reader.applied
        refused = folder / "refused.jsonl"
        self._applier = Applier(order.uri, order.experiment, order.job, fresh=order.fresh, refused=refused, say=say)

    def run(self) -> None:
        """Raises SystemExit where the job is gone and the server does not answer: the next courier goes on."""
        try:
            while not self._replaced and (batch := self._gather()):
                self._until_done(lambda batch=batch: self._deliver(batch))
            if (self._applier.connected or not self._fresh) and not self._replaced:
                self._until_done(self._applier.end_open_runs)
            self._reader.forget()
        finally:
            self._applier.stop()

    @property
    def _replaced(self) -> bool:
        """Whether the next life of a job that was killed has begun, whose courier waits for our end."""
        return self._job.gone and has_writer(self._folder)

    def _gather(self) -> list[Record]:
        """The next batch: what is said in a second, or until it is many or wanted now. Empty when the job is over."""
        batch: list[Record] = []
        until, wanted = float("inf"), False
        while time.monotonic() < until:
            over = self._job.over  # known before reading: what is read after it is the last
            more, self._end = self._reader.read(self._end, _BATCH - len(batch))
            batch += more
            if len(batch) >= _BATCH or (not more and (over or (wanted and batch))):
                break
            if batch and until == float("inf"):
                until = time.monotonic() + GATHER_S
            wanted = self._job.listen(0 if more else _POLL_S) or wanted
        return batch

    def _deliver(self, batch: list[Record]) -> None:
        if self._reader.damaged:
            self._say(f"{self._reader.damaged} records in {self._folder} were damaged on disk and are lost")
            self._reader.damaged = 0
        self._applier.apply(batch)
        self._reader.arrived(self._end)

    def _until_done(self, action: Callable[[], None]) -> None:
        """Do it; on failure say so once, wait, and try again."""
        wait_s, longest_s = _WAITS_S
        complaint, since = "", time.monotonic()
        while True:
            try:
                self._reader.sync()
                action()
                if complaint:
                    self._say(f"{RECOVERED}, after {time.monotonic() - since:.0f} s")
                return
            except Exception as error:  # any failure of a server, a client or a disk must not end delivery
                self._applier.disconnect()
                if not complaint:
                    complaint = database_trouble(self._uri) or why(error)
                    self._say(f"{WAITING} {complaint}")
            if self._job.gone and time.monotonic() - since > _ORPHAN_PATIENCE_S:
                raise SystemExit(1)
            time.sleep(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, longest_s)


def main() -> None:
    folder = Path(sys.argv[1])
    order = Order(**json.loads(_first_line()))
    os.environ.update(_SETTINGS)
    with (folder / "courier.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of a killed job, one may still be at work
        Courier(folder, order, _say).run()


def _first_line() -> bytes:
    """Unbuffered: what comes after it is listened for."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(0, 1)):
        line += byte
    return line


def _say(line: str) -> None:
    with suppress(OSError):  # nobody listens any more
        os.write(1, line.encode() + b"\n")


if __name__ == "__main__":
    main()

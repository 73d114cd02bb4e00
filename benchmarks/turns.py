"""Two runs that are both there, one of which is always stopped: they take turns every few seconds.

What else a machine does comes and goes within minutes; two runs one after the other meet different minutes, two that
take turns meet the same ones. A run here is a command with everything it starts (SIGSTOP reaches idle daemons too).
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

EDGE_S = 0.3  # after a turn's beginning and before its end: what a stopped run does in between counts for neither


@dataclass
class Side:
    """One of two runs. `steps` reads what it has done: (wall time, seconds) of every step, oldest first; `ranks` is in
    the command of the processes that do the steps."""

    process: subprocess.Popen[bytes]
    steps: Callable[[], Sequence[tuple[float, float]]]
    ranks: str
    turns: list[tuple[float, float]] = field(default_factory=list)
    cpu_s: float = 0.0

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def take_turn(self, seconds: float) -> None:
        used = self._ranks_cpu_s()
        self.go_on()
        began = time.time()
        time.sleep(seconds)
        self.turns.append((began + EDGE_S, time.time() - EDGE_S))
        self.stop()
        self.cpu_s += self._ranks_cpu_s() - used

    def of_turns(self) -> list[list[float]]:
        """Seconds of every step that lies within a turn, turn by turn."""
        done = self.steps()
        return [
            [seconds for at, seconds in done if began <= at - seconds and at <= ended] for began, ended in self.turns
        ]

    def cpu_s_a_step(self) -> float:
        """CPU time of the ranks for one step: what else runs on the machine does not count."""
        first, last = self.turns[0][0] - EDGE_S, self.turns[-1][1] + EDGE_S
        return self.cpu_s / sum(first <= at <= last for at, _ in self.steps())

    def _ranks_cpu_s(self) -> float:
        used = 0.0
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if self.ranks in " ".join(process.cmdline()):
                    used += sum(process.cpu_times()[:2])
        return used

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            for process in [own, *own.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)


@contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run in a session of its own; ended with everything it started."""

    def hear_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where this script was itself started with &

    with log.open("wb") as out:
        run = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, preexec_fn=hear_interrupts)
    own = psutil.Process(run.pid)
    try:
        yield run
    finally:
        everything = own.children(recursive=True)
        for process in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)
        run.send_signal(signal.SIGCONT)
        run.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(60)
        for process in [*everything, own]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        run.wait()


def warm(side: Side, steps: int, timeout_s: float = 180.0) -> None:
    """Until it has done that many, then stopped."""
    until = time.monotonic() + timeout_s
    while len(side.steps()) < steps:
        if side.process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"it ended or did no step: {side.process.args}")
        time.sleep(0.2)
    side.stop()

"""Kill workers of a run that writes a line per optimizer step, and say what it cost. It knows nothing of what it kills.

A line is `step seconds life`: the optimizer steps done, wall time, and a number of the process that wrote it. A run
that goes back to a checkpoint writes the same steps again.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil

WORKERS = r"^ray::\S*(TrainWorker|train)"
Answer = TypeVar("Answer")
SETTLED = 25  # optimizer steps after a start before the next kill: the first checkpoint is kept by then


@dataclass(frozen=True)
class Step:
    step: int
    t: float
    life: int


@dataclass(frozen=True)
class Recovery:
    """`seconds`: SIGKILL to the end of the first optimizer step after it; `seconds_to_new`: to the first one that had
    not been done before; `lost_steps`: how many were done twice."""

    seconds: float
    seconds_to_new: float
    lost_steps: int


def read_steps(path: Path) -> list[Step]:
    """What is in the file; a last line that is still being written is left out."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0].splitlines()
    return [Step(int(step), float(t), int(life)) for step, t, life in (line.split() for line in whole)]


def recovery_after(steps: Sequence[Step], killed_at: float) -> Recovery | None:
    """None while the run has not come further than it was."""
    before = [one for one in steps if one.t <= killed_at]
    after = [one for one in steps if one.t > killed_at]
    # Who survived may write the line of a step that was over already. The pause is the longest of the first gaps.
    edges = [killed_at, *(one.t for one in after[:3])]
    gaps = [later - sooner for sooner, later in itertools.pairwise(edges)]
    if len(gaps) < 3:
        return None
    first = gaps.index(max(gaps))
    reached = max(one.step for one in [*before, *after[:first]])
    new = next((one for one in after[first:] if one.step > reached), None)
    if new is None:
        return None
    return Recovery(after[first].t - killed_at, new.t - killed_at, reached + 1 - after[first].step)


def lost_seconds(steps: Sequence[Step], seconds: float) -> float:
    """Of that many seconds from the first line on, those in which no new step was made at the undisturbed pace.

    The pace is the median time between two consecutive steps of one life.
    """
    until = steps[0].t + seconds
    steps = [one for one in steps if one.t <= until]
    following = ((a, b) for a, b in itertools.pairwise(steps) if b.step == a.step + 1 and a.life == b.life)
    pace = statistics.median(b.t - a.t for a, b in following)
    return seconds - (max(one.step for one in steps) - steps[0].step) * pace


def kill_workers(
    command: Sequence[str],
    steps_file: Path,
    *,
    kills: int,
    workers: str = WORKERS,
    seed: int = 1,
    cwd: Path | None = None,
) -> list[Recovery]:
    """Start the run and SIGKILL one of its workers again and again, each time when it has settled."""
    chance = random.Random(seed)
    found = []
    with _running(command, steps_file, cwd) as run:
        killed_at = 0.0
        for _ in range(kills):
            _wait(run, partial(_settled, steps_file, killed_at))
            time.sleep(chance.uniform(0, 3))
            killed_at = _kill_one(run, workers, chance)
            recovery = _wait(run, partial(_recovered, steps_file, killed_at))
            found.append(recovery)
            print(f"  {recovery}", flush=True)
    return found


def seconds_lost_to_faults(
    command: Sequence[str],
    steps_file: Path,
    *,
    minutes: float,
    fault_every_s: float = 60.0,
    workers: str = WORKERS,
    seed: int = 1,
    cwd: Path | None = None,
) -> float:
    """One worker killed at a random moment of every interval, for that long from the first step on."""
    chance = random.Random(seed)
    with _running(command, steps_file, cwd) as run:
        _wait(run, partial(read_steps, steps_file))
        began = time.monotonic()
        for turn in range(int(minutes * 60 / fault_every_s)):
            moment = began + (turn + chance.random()) * fault_every_s
            time.sleep(max(moment - time.monotonic(), 0))
            with suppress(IndexError):  # between two lives there is nobody to kill
                _kill_one(run, workers, chance)
        time.sleep(max(began + minutes * 60 - time.monotonic(), 0))
    return lost_seconds(read_steps(steps_file), minutes * 60)


@contextmanager
def _running(command: Sequence[str], steps_file: Path, cwd: Path | None) -> Iterator[subprocess.Popen[bytes]]:
    steps_file.parent.mkdir(parents=True, exist_ok=True)
    with (steps_file.parent / "output.log").open("ab") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, cwd=cwd, start_new_session=True)
    try:
        yield run
    finally:
        with suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        run.wait()


def _settled(steps_file: Path, since: float) -> bool:
    return sum(one.t > since for one in read_steps(steps_file)) >= SETTLED


def _recovered(steps_file: Path, killed_at: float) -> Recovery | None:
    return recovery_after(read_steps(steps_file), killed_at)


def _wait(run: subprocess.Popen[bytes], ask: Callable[[], Answer | None], timeout_s: float = 180.0) -> Answer:
    """The first answer that is something."""
    deadline = time.monotonic() + timeout_s
    while not (answer := ask()):
        if run.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError("the run ended or stood still; see output.log beside its steps")
        time.sleep(0.02)
    return answer


def _kill_one(run: subprocess.Popen[bytes], workers: str, chance: random.Random) -> float:
    """SIGKILL one; when."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if re.search(workers, " ".join(process.cmdline())):
                found.append(process)
    victim = chance.choice(sorted(found, key=lambda process: process.pid))
    at = time.time()
    os.kill(victim.pid, signal.SIGKILL)
    return at

"""SIGKILL of a worker until the next new optimizer step: ours beside stock Ray Train at its best, same model and batch.

Ours three ways: with a warm standby, and without one, where training goes on with one worker and grows back. Times of our
steps come from the ledger: the moment of a restore, and the length of every turn since. Steps lost are those done twice.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.harness import Row
from benchmarks.stock_train import LENGTH, MICRO, measure_recovery
from benchmarks.training_step import _shards, _spec
from tigerbot_jobs.train.ledger import Event, read_events

KILLS = int(os.environ.get("KILLS", "5"))
SETTLED = 25  # steps between a recovery and the next kill


@dataclass(frozen=True)
class Killed:
    """Seconds from SIGKILL to the end of the first new step, steps done twice, and the pause of growing back."""

    seconds: float
    lost_steps: int
    grow_s: float | None


def main() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = _shards(folder)
        stock = measure_recovery(folder / "stock", KILLS)
        warm = _ours(folder, shards, "warm", {"workers": 2, "standbys": 1})
        alone = _ours(folder, shards, "alone", {"workers": [1, 2], "standbys": 0})
    base = statistics.median(one.seconds_to_new for one in stock)
    grown = [one.grow_s for one in alone if one.grow_s is not None]
    return [
        _row("SIGKILL to the first new step, warm standby", [one.seconds for one in warm], base, "<= 0.1"),
        _row("the same without a standby, on one worker", [one.seconds for one in alone], base, "<= 0.15"),
        _plain("pause to grow back to two workers, seconds", grown, "<= 1"),
        _plain(
            "steps done twice at that kill", [one.lost_steps for one in (*warm, *alone)], "<= the snapshot interval"
        ),
        _plain("the same, stock", [one.lost_steps for one in stock], ""),
    ]


def _row(what: str, ours: list[float], base: float, target: str) -> Row:
    ratios = [seconds / base for seconds in ours]
    about = (statistics.median(ratios), min(ratios), max(ratios), "lower", target, len(ours))
    return Row(f"{what}, ours / stock", *about, ours=f"{statistics.median(ours):.2f} s", stock=f"{base:.2f} s")


def _plain(what: str, values: list[float] | list[int], target: str) -> Row:
    known = values or [float("nan")]
    return Row(what, statistics.median(known), min(known), max(known), "lower", target, len(values))


def _ours(folder: Path, shards: Path, name: str, scale: dict[str, Any]) -> list[Killed]:
    spec = _spec(folder, shards, name) | {"scale": scale | {"threads_per_worker": 1}}
    spec["train"] |= {"batch_tokens": 2 * MICRO * LENGTH, "micro_batch": MICRO, "tokens": 10**8}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    chance, found, ledger = random.Random(1), [], folder / name / "ledger.jsonl"
    with _running([sys.executable, "-m", "tigerbot.cli", "run", str(path)], folder / f"{name}.log") as run:
        for _ in range(KILLS):
            _wait(run, ledger, lambda events: _settled(events, scale))
            time.sleep(chance.uniform(0, 2))
            before = read_events(ledger)
            seen = len(before)
            victim = chance.choice(_members(before))
            killed_at = time.time()
            os.kill(int(victim.rsplit("-", 1)[1]), signal.SIGKILL)
            found.append(_wait(run, ledger, lambda events, at=killed_at, seen=seen: _killed(events, seen, at, scale)))
            print(f"  {name}: {found[-1]}", flush=True)
    return found


def _killed(events: list[Event], seen: int, at: float, scale: dict[str, Any]) -> Killed | None:
    """What a kill cost, once training has gone on (and grown back, where it had to shrink)."""
    after = events[seen:]
    restored = [event for event in after if event.kind == "restored"]
    firsts = [_first_turn(after, event) for event in restored]
    grows = scale["standbys"] == 0
    if not restored or firsts[0] is None or (grows and (len(restored) < 2 or firsts[1] is None)):
        return None
    reached = max((int(row[0]) for event in events[:seen] for row in event.items("rows")), default=0)
    late = [
        event
        for event in after
        if event.kind == "steps" and event.whole("generation") < restored[0].whole("generation")
    ]
    reached = max([reached, *(int(row[0]) for event in late for row in event.items("rows"))])
    lost = max(0, reached - restored[0].whole("step"))
    # Steps that were done twice do not count: the first new one is as many turns later.
    seconds = restored[0].t - at + firsts[0] * (lost + 1)
    if not grows:
        return Killed(seconds, lost, None)
    paused = [event for event in after if event.kind == "generation" and event.text("reason") == "grow"]
    return Killed(seconds, lost, restored[1].t - paused[0].t if paused else None)


def _first_turn(events: list[Event], restored: Event) -> float | None:
    for event in events:
        if event.kind == "steps" and event.whole("generation") == restored.whole("generation"):
            return float(event.items("rows")[0][1])
    return None


def _members(events: list[Event]) -> list[str]:
    return [event for event in events if event.kind == "generation"][-1].items("members")


def _settled(events: list[Event], scale: dict[str, Any]) -> bool:
    """Full size, the standby back, and some steps since the last restore."""
    generations = [event for event in events if event.kind == "generation"]
    if not generations or generations[-1].whole("world_size") < 2:
        return False
    ready = {event.text("worker") for event in events if event.kind == "worker_ready"}
    ready = {worker for worker in ready if psutil.pid_exists(int(worker.rsplit("-", 1)[1]))}
    number = generations[-1].whole("generation")
    steps = sum(
        len(event.items("rows")) for event in events if event.kind == "steps" and event.whole("generation") == number
    )
    return len(ready) >= 2 + scale["standbys"] and steps >= SETTLED


def _wait(run: subprocess.Popen[bytes], ledger: Path, ask: Any, timeout_s: float = 240.0) -> Any:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and run.poll() is None:
        if ledger.exists() and (answer := ask(read_events(ledger))):
            return answer
        time.sleep(0.1)
    raise RuntimeError(f"the run ended or stood still; see {ledger.parent.parent}")


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        run = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    try:
        yield run
    finally:
        run.send_signal(signal.SIGINT)
        try:
            run.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


if __name__ == "__main__":
    print(json.dumps([row.__dict__ for row in main()], indent=1, default=str))

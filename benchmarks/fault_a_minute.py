"""Seconds without a new step while one worker is killed at a random moment of every minute: ours beside stock Ray Train.

Both train the same model on two workers; a second counts as lost where no step was done that had not been done before.
`MINUTES` says for how long each, 15 unless told otherwise.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.harness import Row
from benchmarks.recovery import Step, lost_seconds
from benchmarks.stock_train import LENGTH, MICRO, measure_lost_seconds
from benchmarks.training_recovery import _members, _running, _wait
from benchmarks.training_step import _shards, _spec
from tigerbot_jobs.train.goodput import account
from tigerbot_jobs.train.ledger import read_events

MINUTES = float(os.environ.get("MINUTES", "15"))
EVERY_S = 60.0


def main() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stock = measure_lost_seconds(folder / "stock", MINUTES, fault_every_s=EVERY_S)
        ours = _ours(folder, _shards(folder))
    ratio = stock / ours
    what = f"lost seconds, one kill a minute for {MINUTES:g} min: stock / ours"
    return [Row(what, ratio, ratio, ratio, "higher", ">= 3", 1, ours=f"{ours:.1f} s", stock=f"{stock:.1f} s")]


def _ours(folder: Path, shards: Path) -> float:
    spec = _spec(folder, shards, "ours")
    spec["scale"] = {"workers": 2, "standbys": 1, "threads_per_worker": 1}
    spec["train"] |= {"batch_tokens": 2 * MICRO * LENGTH, "micro_batch": MICRO, "tokens": 10**8}
    path, ledger, chance = folder / "ours.yaml", folder / "ours/ledger.jsonl", random.Random(1)
    path.write_text(yaml.safe_dump(spec))
    with _running([sys.executable, "-m", "tigerbot.cli", "run", str(path)], folder / "ours.log") as run:
        _wait(run, ledger, lambda events: any(event.kind == "steps" for event in events))
        began = time.monotonic()
        for turn in range(int(MINUTES * 60 / EVERY_S)):
            moment = began + (turn + chance.random()) * EVERY_S
            time.sleep(max(moment - time.monotonic(), 0))
            victim = chance.choice([member for member in _members(read_events(ledger)) if member])
            os.kill(int(victim.rsplit("-", 1)[1]), signal.SIGKILL)
        time.sleep(max(began + MINUTES * 60 - time.monotonic(), 0))
        turns = account(read_events(ledger)).timeline.turns
    return lost_seconds([Step(turn.step, turn.end, turn.generation) for turn in turns], MINUTES * 60)


if __name__ == "__main__":
    print(json.dumps([row.__dict__ for row in main()], indent=1, default=str))

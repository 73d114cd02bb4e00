"""The simulator's goodput beside that of real runs to which faults happen: workers killed or frozen every so often.

What a fault costs is measured in one run of each kind; the others are predicted from that, from their own number of
faults, and from when they began to train. Nothing else of a predicted run goes in.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from benchmarks.harness import Row
from benchmarks.training_recovery import _members, _running, _wait
from benchmarks.training_step import LENGTH, MICRO, _shards, _spec
from tigerbot_jobs.simulate.measured import summarize
from tigerbot_jobs.simulate.predict import LedgerSummary, MeasuredFault, predict
from tigerbot_jobs.train.goodput import account
from tigerbot_jobs.train.ledger import read_events

SECONDS = float(os.environ.get("SECONDS_EACH", "90"))


@dataclass(frozen=True)
class Setting:
    """Who is hit every `every_s` seconds: killed or frozen, in turn where both are named."""

    kinds: tuple[str, ...]
    every_s: float

    @property
    def name(self) -> str:
        what = " and ".join(self.kinds) or "nothing"
        return f"{what} every {self.every_s:.0f} s"


CALIBRATE = (Setting(("kill",), 25), Setting(("freeze",), 30))
PREDICT = (
    Setting((), 1000),
    Setting(("kill",), 40),
    Setting(("kill",), 18),
    Setting(("freeze",), 45),
    Setting(("kill", "freeze"), 22),
)


def main() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = _shards(folder)
        known = [_measured(folder, shards, setting)[0] for setting in CALIBRATE]
        costs = {fault.kind: fault for summary in known for fault in summary.faults}
        return [_row(folder, shards, setting, known[0], costs) for setting in PREDICT]


def _row(folder: Path, shards: Path, setting: Setting, known: LedgerSummary, costs: dict[str, MeasuredFault]) -> Row:
    own, measured = _measured(folder, shards, setting)
    faults = tuple(replace(costs[one.kind], per_hour=one.per_hour) for one in own.faults if one.kind in costs)
    found = predict(replace(known, wall_s=own.wall_s, start_s=own.start_s, faults=faults)).goodput
    off = 100 * (found.mean - measured)
    print(f"  {setting.name}: measured {measured:.3f}, predicted {found.mean:.3f}", flush=True)
    return Row(
        f"goodput predicted - measured, points: {setting.name}", off, off, off, "lower", "within 5", 1,
        ours=f"{found.mean:.1%}", stock=f"{measured:.1%}",
    )  # fmt: skip


def _measured(folder: Path, shards: Path, setting: Setting) -> tuple[LedgerSummary, float]:
    """One run; its summary, and its goodput."""
    name = f"run-{'-'.join(setting.kinds) or 'quiet'}-{setting.every_s:.0f}"
    spec = _spec(folder, shards, name)
    spec["scale"] = {"workers": 2, "standbys": 1, "threads_per_worker": 1}
    spec["train"] |= {"batch_tokens": 2 * MICRO * LENGTH, "micro_batch": MICRO, "tokens": 10**8}
    path, ledger = folder / f"{name}.yaml", folder / name / "ledger.jsonl"
    path.write_text(yaml.safe_dump(spec))
    chance = random.Random(1)
    with _running([sys.executable, "-m", "tigerbot.cli", "run", str(path)], folder / f"{name}.log") as run:
        _wait(run, ledger, lambda events: any(event.kind == "steps" for event in events))
        until, turn = time.monotonic() + SECONDS, 0
        while (left := until - time.monotonic()) > setting.every_s / 2:
            time.sleep(min(setting.every_s * chance.uniform(0.8, 1.2), left))
            if setting.kinds and time.monotonic() < until:
                victim = chance.choice([member for member in _members(read_events(ledger)) if member])
                kind = setting.kinds[turn % len(setting.kinds)]
                os.kill(int(victim.rsplit("-", 1)[1]), signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
                turn += 1
        time.sleep(max(0.0, until - time.monotonic()))
        found = account(read_events(ledger))
    return summarize(found), found.goodput


if __name__ == "__main__":
    print(json.dumps([row.__dict__ for row in main()], indent=1, default=str))

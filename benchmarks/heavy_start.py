"""How long a heavy trial takes to start: from its begin record to its first formed process group, the first and the later.

One sweep of `TRIALS` trials, one at a time, whose slot keeps its workers. The first trial pays Ray Train's start and the
imports; the later ones find workers that have them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.harness import Row
from benchmarks.stock_train import LENGTH, MICRO
from benchmarks.training_step import _shards, _spec
from tigerbot_jobs.train.ledger import read_events

TRIALS = int(os.environ.get("TRIALS", "5"))
STEPS, WORKERS = 10, int(os.environ.get("WORKERS", "1"))


def main() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        first, *later = starts(Path(folder))
    ratios = [seconds / first for seconds in later]
    about = (statistics.median(ratios), min(ratios), max(ratios), "lower", "<= 0.5", len(later))
    times = {"ours": f"{statistics.median(later):.2f} s", "stock": f"{first:.2f} s"}
    what = "heavy trial, begin to a formed group: second and later / the first"
    return [Row(what, *about, **times, note=f"one sweep, {WORKERS} worker(s); the column `stock` is the first trial")]


def starts(folder: Path) -> list[float]:
    """Seconds of every trial of a sweep, in the order in which they began."""
    train = _spec(folder, _shards(folder), "trial")
    train["scale"] = {"workers": WORKERS, "threads_per_worker": 1}
    batch = WORKERS * MICRO * LENGTH
    train["train"] |= {"batch_tokens": batch, "micro_batch": MICRO, "tokens": STEPS * batch}
    (folder / "train.yaml").write_text(yaml.safe_dump(train))
    sweep = {
        "kind": "sweep",
        "name": "starts",
        "target": str(folder / "train.yaml"),
        "trial": "heavy",
        "space": {"train.lr": {"log_uniform": [1e-4, 1e-2]}},
        "searcher": "random",
        "scheduler": "none",
        "trials": TRIALS,
        "max_concurrent": 1,
        "storage": {"uri": str(folder)},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    path = folder / "starts.yaml"
    path.write_text(yaml.safe_dump(sweep))
    subprocess.run([sys.executable, "-m", "tigerbot.cli", "run", str(path)], check=True, stdout=subprocess.DEVNULL)
    return [formed - begun for begun, formed in _moments(folder / "starts")]


def _moments(sweep: Path) -> list[tuple[float, float]]:
    """Unix times of every trial's begin record and of its first formed group."""
    records = [json.loads(line) for line in (sweep / "trials.jsonl").read_text().splitlines()]
    found = []
    for record in records:
        if record["event"] == "begin":
            events = read_events(sweep / "trials" / record["name"] / "ledger.jsonl")
            found.append((record["t"], next(event.t for event in events if event.kind == "group_formed")))
    return found

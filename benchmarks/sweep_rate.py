"""Light tracked trials: ours beside Tune with its MLflow callback and reused actors; then thousands of ours, and memory.

A trial does `WORK` rounds of hashing (50 ms of one core) and reports `POINTS` times; trials are scheduled one by one.
Both sides track into an MLflow of their own over SQLite, and time runs until the last row is there. Run with sizes of
your own: `python -m benchmarks.sweep_rate 300 20`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from benchmarks.harness import Row, ratio

HERE = Path(__file__).parent
TRIALS, POINTS, AT_ONCE = 3000, 20, 2
PAIR_TRIALS = 60
WORK_S = 0.05


def objective(params: Mapping[str, Any], report: Callable[[dict[str, float]], None]) -> None:
    """A loss that depends on the parameters alone, after as much work a point whatever they are."""
    for step in range(1, params["points"] + 1):
        digest = b""
        for _ in range(params["rounds"] // params["points"]):
            digest = hashlib.sha256(digest).digest()
        report({"loss": abs(params["x"]) + 1 / step, "step": step})


def rounds_of(seconds: float) -> int:
    """Rounds of hashing that take one core so long."""
    began, count, digest = time.perf_counter(), 0, b""
    while time.perf_counter() - began < 0.5:
        for _ in range(1000):
            digest = hashlib.sha256(digest).digest()
        count += 1000
    return int(count * seconds / (time.perf_counter() - began))


@dataclass(frozen=True)
class Swept:
    """`seconds` from the first trial's begin to the last row in MLflow; RSS of the driver in MiB by trials ended."""

    seconds: float
    rows: int
    rss: dict[int, float]


def ours(trials: int, points: int, rounds: int) -> Swept:
    with tempfile.TemporaryDirectory() as folder:
        params = {"points": points, "rounds": rounds}
        spec = {
            "kind": "sweep",
            "name": "rate",
            "target": "benchmarks.sweep_rate:objective",
            "space": {"x": {"uniform": [-1, 1]}},
            "trials": trials,
            "max_concurrent": AT_ONCE,
            "searcher": "random",
            "scheduler": "none",
            "params": params,
            "storage": {"uri": folder},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        }
        path = Path(folder) / "rate.yaml"
        path.write_text(yaml.safe_dump(spec))
        environment = os.environ | {"PYTHONPATH": str(HERE.parent)}
        command = [sys.executable, "-m", "tigerbot.cli", "run", str(path)]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        journal, rss = Path(folder) / "rate/trials.jsonl", dict[int, float]()
        while process.poll() is None:
            time.sleep(1.0)
            _sample(process.pid, journal, rss)
        if process.returncode:
            raise RuntimeError(f"the sweep ended with {process.returncode}")
        began = next(r["t"] for r in map(json.loads, journal.open()) if r["event"] == "begin")
        return Swept(time.time() - began, _rows(Path(folder) / "mlflow.db", "loss"), rss)


def _sample(pid: int, journal: Path, rss: dict[int, float]) -> None:
    ended = journal.read_bytes().count(b'"event":"end"') if journal.exists() else 0
    try:
        now = psutil.Process(pid).memory_info().rss / 2**20
    except psutil.NoSuchProcess:
        return
    for mark in (100, 500, 1000, 2000, 3000):
        if ended >= mark:
            rss.setdefault(mark, now)


def stock(trials: int, points: int, rounds: int) -> Swept:
    """In a process of its own: Ray is started once a process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "benchmarks.sweep_rate",
            "stock",
            folder,
            str(trials),
            str(points),
            str(rounds),
        ]
        environment = os.environ | {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
        found = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        return Swept(float(found.stdout.split()[-1]), _rows(Path(folder) / "mlflow.db", "loss"), {})


def _stock_here(folder: str, trials: int, points: int, rounds: int) -> None:
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    def trial(params: dict[str, Any]) -> None:
        objective(params | {"points": points, "rounds": rounds}, tune.report)

    ray.init(address="local", num_cpus=AT_ONCE, log_to_driver=False, include_dashboard=False)
    uri = f"sqlite:///{folder}/mlflow.db"
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"x": tune.uniform(-1, 1)},
        tune_config=tune.TuneConfig(num_samples=trials, reuse_actors=True, max_concurrent_trials=AT_ONCE),
        run_config=tune.RunConfig(
            storage_path=folder, verbose=0, callbacks=[MLflowLoggerCallback(tracking_uri=uri, experiment_name="rate")]
        ),
    )
    began = time.time()
    tuner.fit()
    print(time.time() - began)


def _rows(database: Path, key: str) -> int:
    with closing(sqlite3.connect(database)) as opened:
        return opened.execute("select count(*) from metrics where key = ?", (key,)).fetchone()[0]


def main(trials: int = TRIALS, points: int = POINTS) -> list[Row]:
    rounds = rounds_of(WORK_S)
    many = ours(trials, points, rounds)
    if many.rows != trials * points:
        raise RuntimeError(f"MLflow holds {many.rows} points, {trials * points} were reported")
    each = many.seconds / trials - WORK_S / AT_ONCE
    work = f"{WORK_S * 1000:.0f} ms of work, {AT_ONCE} at once, random search, one round"
    rss = ", ".join(f"{value:.0f} at {mark:,}" for mark, value in many.rss.items())
    last = max(many.rss.values(), default=0.0)
    return [
        _once(f"{trials:,} tracked light trials x {points} points, s", many.seconds, "< 600", work),
        _once("the same: overhead a trial, s", each, "<= 0.1", "wall time a trial less its work"),
        _once("the same: points a second in MLflow", many.rows / many.seconds, ">= 90", "useful rows only", "higher"),
        _once("the same: driver RSS, MiB", last, "< 1536, flat", rss),
        ratio(
            f"seconds a tracked light trial ({points} points)",
            lambda: ours(PAIR_TRIALS, points, rounds).seconds / PAIR_TRIALS,
            lambda: stock(PAIR_TRIALS, points, rounds).seconds / PAIR_TRIALS,
            unit="s",
            target="<= 0.2",
            better="lower",
            note=f"stock: Tune, reuse_actors, its MLflow callback; {PAIR_TRIALS} trials; ours ends when MLflow has all",
        ),
    ]


def _once(measure: str, value: float, target: str, note: str, better: str = "lower") -> Row:
    return Row(measure, value, value, value, better, target, 1, note=note)


if __name__ == "__main__":
    if sys.argv[1:2] == ["stock"]:
        _stock_here(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        for row in main(*map(int, sys.argv[1:])):
            print(row)

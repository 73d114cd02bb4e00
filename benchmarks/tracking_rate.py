"""Tracked results a second under Tune, ours beside Ray's own MLflow callback; what tracking costs its caller; memory.

Both sides run the same light trials (50 ms of arithmetic, reused actors, Tune's file loggers off), each side in a
process of its own. Stock is `MLflowLoggerCallback` straight into a SQLite file, its fastest way; ours is a callback
that says the same to a `Tracker`, which ends in MLflow's server over a SQLite file. The clock runs from the first trial
until the last row is in the database. Ray, MLflow and the database are up by then on both sides.

    python -m benchmarks.tracking_rate ours|stock FOLDER POINTS TRIALS     results a second of one side
    python -m benchmarks.tracking_rate caller FOLDER POINTS TRIALS         milliseconds a trial costs its caller
    python -m benchmarks.tracking_rate memory FOLDER POINTS TRIALS         resident MiB of job and courier, on the way
"""

from __future__ import annotations

import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Row, rate, ratio
from tigerbot.tracking import TrackedRun, Tracker

WORK_S = 0.05
ROOT = Path(__file__).parents[1]
FEW, MANY = 500, 3000  # runs, of the memory row


def main() -> list[Row]:
    rows = []
    for points, trials, target in ((13, 30, ">= 5 (and ours >= 90/s)"), (5, 60, ">= 5")):
        rows.append(
            ratio(
                f"tracked results/s, {points} points a trial",
                partial(_in_a_process, "ours", points, trials),
                partial(_in_a_process, "stock", points, trials),
                unit="results/s",
                target=target,
                note=f"{trials} trials of {WORK_S * 1e3:.0f} ms a process; stock also writes about 11 other rows a result",
            )
        )
    cost = partial(_in_a_process, "caller", 13, 300)
    rows.append(rate("a tracked trial of 13 points costs its caller, ms", cost, target="< 2", better="lower"))
    growth = partial(_in_a_process, "memory", 13, MANY)
    measure = f"resident memory of job and courier at {MANY} runs / at {FEW}"
    rows.append(rate(measure, growth, target="<= 1.05", better="lower", rounds=3, note="13 points a run"))
    return rows


def _in_a_process(what: str, points: int, trials: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.tracking_rate", what, folder, str(points), str(trials)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    return float(said.split()[-1])


def tune_rate(side: str, folder: Path, points: int, trials: int) -> float:
    """Results a second of one side, all of them in its database."""
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    import ray
    from ray import tune

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    callback, finish = (_ours if side == "ours" else _stock)(folder)
    tuner = tune.Tuner(
        partial(_objective, points=points),
        param_space={"lr": tune.uniform(0, 1), "width": tune.choice([64, 128]), "seed": tune.randint(0, 9)},
        tune_config=tune.TuneConfig(num_samples=trials, max_concurrent_trials=2, reuse_actors=True),
        run_config=tune.RunConfig(name="tune", storage_path=str(folder), callbacks=[callback], verbose=0),
    )
    began = time.perf_counter()
    tuner.fit()
    finish()
    seconds = time.perf_counter() - began
    ray.shutdown()
    with sqlite3.connect(folder / "mlflow.db") as database:
        query = "select count(*) from (select distinct run_uuid, step from metrics where key = 'loss')"
        (found,) = database.execute(query).fetchone()
    assert found == points * trials, f"{found} of {points * trials} results arrived"
    return found / seconds


def _objective(config: dict[str, Any], *, points: int) -> None:
    from ray import tune

    for step in range(points):
        until, total = time.perf_counter() + WORK_S / points, 0.0
        while time.perf_counter() < until:
            total += sum(x * x for x in range(1000))
        tune.report({"loss": (config["lr"] - 0.3) ** 2 + 1 / (step + 1)})


def _stock(folder: Path) -> tuple[Any, Callable[[], Any]]:
    from mlflow import MlflowClient
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    uri = f"sqlite:///{folder}/mlflow.db"
    MlflowClient(uri).create_experiment("rate")
    return MLflowLoggerCallback(tracking_uri=uri, experiment_name="rate"), lambda: None


def _ours(folder: Path) -> tuple[Any, Callable[[], Any]]:
    from ray.tune import Callback

    tracker = _tracker(folder)
    parent = tracker.run("sweep")
    assert tracker.flush(120)
    runs: dict[str, TrackedRun] = {}

    class ToTracker(Callback):
        def __reduce__(self) -> tuple:
            return object, ()  # Tune pickles its callbacks for a restore that is not used here

        def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            runs[trial.trial_id] = tracker.run(trial.trial_id, params=trial.config, parent=parent)

        def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
            runs[trial.trial_id].log({"loss": result["loss"]}, step=result["training_iteration"])

        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            runs.pop(trial.trial_id).finish()

    return ToTracker(), lambda: tracker.flush(300)


def caller_cost(folder: Path, points: int, trials: int) -> float:
    """Median milliseconds that opening, logging and finishing a run takes from its caller, while others arrive."""
    tracker = _tracker(folder)
    tracker.run("parent")
    tracker.flush(120)
    found = []
    for trial in range(trials):
        began = time.perf_counter()
        _one_run(tracker, trial, points)
        found.append(time.perf_counter() - began)
        time.sleep(WORK_S)
    assert tracker.close(300)
    return 1e3 * statistics.median(found)


def memory_growth(folder: Path, points: int, trials: int) -> float:
    """Resident memory of job and courier at `trials` runs, in terms of that at the first few hundred."""
    tracker = _tracker(folder)
    few = 0.0
    for trial in range(trials):
        _one_run(tracker, trial, points)
        if trial % 20 == 0:  # the courier has to have seen what is counted
            tracker.flush(300)
        if trial == min(FEW, trials // 6):
            few = _resident(tracker)
    tracker.flush(300)
    many = _resident(tracker)
    assert tracker.close(300)
    print(f"  {few:.0f} MiB, then {many:.0f} MiB", file=sys.stderr)
    return many / few


def _one_run(tracker: Tracker, trial: int, points: int) -> None:
    run = tracker.run(f"trial-{trial}", params={"lr": trial / 7, "width": 64})
    for step in range(points):
        run.log({"loss": trial / (step + 1)}, step=step)
    run.finish()


def _resident(tracker: Tracker) -> float:
    job = psutil.Process()
    couriers = [child for child in job.children() if "tigerbot.courier" in child.cmdline()]
    return sum(process.memory_info().rss for process in [job, *couriers]) / 2**20


def _tracker(folder: Path) -> Tracker:
    return Tracker(f"sqlite:///{folder}/mlflow.db", "rate", folder / "run")


if __name__ == "__main__":
    what, folder, points, trials = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    sides = {"caller": caller_cost, "memory": memory_growth}
    print(sides.get(what, partial(tune_rate, what))(folder, points, trials))

"""The 100 best of 3,000 trials with 20 points each: from a sweep's journal, and by MLflow's own client.

Both sides begin from what is on disk, in the page cache, and must name the same hundred. MLflow's client opens its SQLite
file in its own process, without a server in between, which is the faster of its ways.
"""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, rate, ratio
from tigerbot_jobs.sweep.analysis_read import read_history
from tigerbot_jobs.sweep.journal import JOURNAL
from tigerbot_jobs.sweep.page_report import write_report

RUNS, POINTS, BEST = 3000, 20, 100
BEGAN = 1_700_000_000


def main() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        events = list(_events())
        journal = _journal(Path(folder) / JOURNAL, events)
        client, experiment = _tracked(f"sqlite:///{folder}/mlflow.db", events)

        def ours() -> float:
            began = time.perf_counter()
            found = [trial.name for trial in read_history(journal).best(BEST)]
            return _checked(found, time.perf_counter() - began)

        def stock() -> float:
            began = time.perf_counter()
            runs = client.search_runs([experiment], order_by=["metrics.loss ASC"], max_results=BEST)
            seconds = time.perf_counter() - began
            return _checked([run.info.run_name for run in runs], seconds)

        wanted: list[list[str]] = []

        def _checked(found: list[str], seconds: float) -> float:
            wanted.append(found)
            if found != wanted[0]:
                raise RuntimeError("the two sides name different trials as the best")
            return seconds

        ours(), stock()  # imports, connections and the page cache are nobody's merit
        size = f"{RUNS:,} trials x {POINTS} points"
        page = write_report(journal, Path(folder) / "report.html")
        return [
            ratio(f"the {BEST} best of {size}", ours, stock, unit="s", target="shown", better="lower"),
            rate(f"the {BEST} best of {size}, s", ours, target="<= 0.1", better="lower"),
            rate(
                f"the page of {size}, s",
                lambda: _seconds(lambda: write_report(journal, page)),
                target="shown",
                better="lower",
                rounds=3,
                note=f"{page.stat().st_size / 1e6:.2f} MB",
            ),
        ]


def _events() -> Iterator[dict[str, Any]]:
    """A sweep as its driver writes it, every trial run to its end."""
    about = {"trials": RUNS, "metric": "loss", "mode": "min", "searcher": "random", "scheduler": "none"}
    yield {"event": "open", "driver": "0badcafe", **about, "price_per_card_hour": 2.0, "t": BEGAN}
    rng = random.Random(1)
    for index in range(RUNS):
        name, config, began = f"trial-{index:04d}", f"c{index:04d}", BEGAN + index
        params = {"lr": 10 ** rng.uniform(-4, -1), "width": rng.choice([64, 128]), "dropout": rng.uniform(0, 0.5)}
        begin = {"name": name, "params": params, "config": config, "seed": 1, "parent": None, "attempt": 1}
        yield {"event": "begin", **begin, "cards": 1.0, "node": "n1", "t": began}
        floor, loss = 2 + (math.log10(params["lr"]) + 2.5) ** 2 + rng.gauss(0, 0.05), math.nan
        for step in range(1, POINTS + 1):
            loss = floor + 3 * math.exp(-step / 5)
            yield {
                "event": "point",
                "name": name,
                "step": step,
                "value": loss,
                "metrics": {"loss": loss},
                "t": began + step,
            }
        end = {"name": name, "status": "done", "metric": loss, "error": "", "cause": "", "seconds": float(POINTS)}
        yield {"event": "end", **end, "t": began + POINTS}


def _journal(path: Path, events: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(event, separators=(",", ":")) + "\n" for event in events), encoding="utf-8")
    return path


def _tracked(uri: str, events: list[dict[str, Any]]) -> tuple[Any, str]:
    """The same trials as runs of MLflow."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(uri)
    experiment = client.create_experiment("sweep")
    points: list[Metric] = []
    run_id = ""
    for event in events:
        if event["event"] == "begin":
            run = client.create_run(experiment, int(event["t"] * 1000), run_name=event["name"])
            run_id, points = run.info.run_id, []
            client.log_batch(run_id, params=[Param(name, str(value)) for name, value in event["params"].items()])
        elif event["event"] == "point":
            points.append(Metric("loss", event["value"], int(event["t"] * 1000), event["step"]))
        elif event["event"] == "end":
            client.log_batch(run_id, metrics=points)
            client.set_terminated(run_id, end_time=int(event["t"] * 1000))
    return client, experiment


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began

"""A node dies under a sweep: what had ended stays, what ran there runs again elsewhere, and MLflow has each trial once."""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from nodes import HealthCheck, RayCluster
from processes import Driver

pytestmark = pytest.mark.soak
TRIALS, STEPS = 14, 6
LATE = HealthCheck(period_ms=3000, timeout_ms=3000, failures=4)  # long after the driver hears nothing from a worker
OBJECTIVES = Path(__file__).parents[1] / "jobs/sweep"


def test_trials_of_a_node_that_is_lost_run_again_and_no_other_does(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(OBJECTIVES)}
    about = {"health_check": LATE, "environment_of_nodes": environment}
    with RayCluster(workers=1, cpus=1, head_cpus=1, **about) as cluster:
        command = [sys.executable, "-m", "tigerbot.cli", "run", str(sweep(tmp_path))]
        driver = cluster.run_driver(command, environment=environment)
        wait_until_both_nodes_are_at_work(tmp_path, driver)
        before = records(tmp_path)
        cluster.kill_node("node1")
        status = driver.wait(240)

    assert status == 0, driver.output()
    after = records(tmp_path)
    again = [record for record in after if record["event"] == "begin" and record["attempt"] > 1]
    nodes = {record["name"]: record["node"] for record in before if record["event"] == "begin"}
    assert [(record["after"], record["attempt"]) for record in again] == [("node", 2)]
    assert again[0]["name"] in running(before) and again[0]["node"] != nodes[again[0]["name"]]
    assert all(record["node"] == again[0]["node"] for record in after[len(before) :] if record["event"] == "begin")
    assert after[: len(before)] == before and not ends(before).keys() & {r.get("name") for r in after[len(before) :]}
    assert list(ends(after).values()) == ["done"] * TRIALS
    assert points(after) == {(name, step) for name in ends(after) for step in range(1, STEPS + 1)}
    assert mlflow_runs(tmp_path) == [(f"walks-{name}", "FINISHED", STEPS, STEPS) for name in sorted(ends(after))]


def sweep(folder: Path) -> Path:
    spec = {
        "kind": "sweep",
        "name": "walks",
        "target": "objectives:walk",
        "space": {"x": {"uniform": [-1, 1]}},
        "params": {"sleep_s": 0.5, "steps": STEPS},
        "trials": TRIALS,
        "searcher": "random",
        "scheduler": "none",
        "storage": {"uri": str(folder)},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    path = folder / "walks.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def wait_until_both_nodes_are_at_work(folder: Path, driver: Driver) -> None:
    """Some trials have ended, and one on each node is between its first and its last steps."""
    until = time.monotonic() + 150
    while True:
        found = records(folder)
        steps = [max((s for n, s in points(found) if n == name), default=0) for name in running(found)]
        nodes = {record["node"] for record in found if record["event"] == "begin" and record["name"] in running(found)}
        if len(ends(found)) >= 4 and len(nodes) == 2 and all(2 <= step <= STEPS - 3 for step in steps):
            return
        assert not driver.ended and time.monotonic() < until, driver.output()
        time.sleep(0.02)


def records(folder: Path) -> list[dict[str, Any]]:
    path = folder / "walks/trials.jsonl"
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [json.loads(line) for line in whole]


def ends(found: list[dict[str, Any]]) -> dict[str, str]:
    return {record["name"]: record["status"] for record in found if record["event"] == "end"}


def running(found: list[dict[str, Any]]) -> set[str]:
    return {record["name"] for record in found if record["event"] == "begin"} - ends(found).keys()


def points(found: list[dict[str, Any]]) -> set[tuple[str, int]]:
    return {(record["name"], record["step"]) for record in found if record["event"] == "point"}


def mlflow_runs(folder: Path) -> list[tuple[Any, ...]]:
    """Name, state, points and different steps of every trial's run."""
    query = """select r.name, r.status, count(*), count(distinct m.step) from runs r join metrics m using (run_uuid)
        where m.key = 'loss' group by run_uuid order by r.name"""
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        return database.execute(query).fetchall()

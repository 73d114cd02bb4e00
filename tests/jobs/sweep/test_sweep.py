"""Sweeps for real: Tune, Optuna, a local MLflow, and a driver that is killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tigerbot.errors import SpecError, TigerError
from tigerbot.runner import run_spec
from tigerbot.runs import read_json
from tigerbot.spec import parse_spec
from tigerbot_jobs.sweep.ledger import Ledger
from tigerbot_jobs.sweep.space import grid_points, tune_space

HERE = Path(__file__).parent


def sweep(storage: Path, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "sweep",
        "name": "bowl",
        "target": "objectives:bowl",
        "space": {"lr": {"log_uniform": [1e-5, 1e-1]}, "kind": {"choice": ["中", "en"]}},
        "trials": 14,
        "scheduler": "none",
        "storage": {"uri": str(storage)},
        "tracking": {"uri": f"sqlite:///{storage}/mlflow.db", "experiment": "调参"},
    } | fields


def mlflow_rows(storage: Path, query: str) -> list[tuple]:
    with sqlite3.connect(storage / "mlflow.db") as database:
        return database.execute(query).fetchall()


def test_a_killed_sweep_goes_on_and_no_trial_is_lost_or_doubled(tmp_path: Path) -> None:
    raw = sweep(tmp_path, params={"sleep_s": 0.3}, searcher="tpe")
    spec = tmp_path / "bowl.yaml"
    spec.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    command = [sys.executable, "-m", "tigerbot.cli", "run", str(spec)]
    environment = os.environ | {"PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(command, env=environment)
    until = time.monotonic() + 90
    while len(ended := _ended(tmp_path)) < 5:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    subprocess.run(command, check=True, env=environment, timeout=200)

    result = read_json(tmp_path / "bowl/state.json", {})["result"]
    assert len(result["trials"]) == 14 and all(trial["status"] == "done" for trial in result["trials"])
    assert {name: result_of(result, name) for name in ended} == ended  # what had ended stayed as it was
    assert result["metric"] < 1.5
    assert mlflow_rows(tmp_path, "select count(*), count(distinct name) from runs") == [(15, 15)]
    assert mlflow_rows(tmp_path, "select distinct status from runs") == [("FINISHED",)]
    assert mlflow_rows(tmp_path, "select count(*) from tags where key = 'mlflow.parentRunId'") == [(14,)]
    points = "select count(*) from metrics m join runs r using (run_uuid) where m.key = 'loss' group by r.name"
    assert set(mlflow_rows(tmp_path, points)) == {(3,)}


def _ended(storage: Path) -> dict[str, float | None]:
    path = storage / "bowl/trials.jsonl"
    if not path.exists():
        return {}
    ledger = Ledger(path)
    ledger.close()
    return {entry.name: entry.metric for entry in ledger.ended}


def result_of(result: dict[str, Any], name: str) -> float:
    return next(trial["metric"] for trial in result["trials"] if trial["name"] == name)


def test_a_sweep_whose_every_trial_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.syspath_prepend(str(HERE))
    raw = sweep(tmp_path, target="objectives:broken", trials=2, name="broken")

    with pytest.raises(TigerError, match=r"every trial failed: .*this target cannot work"):
        run_spec(parse_spec(raw))

    assert read_json(tmp_path / "broken/state.json", {})["status"] == "failed"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"lr": {"loguniform": [1, 2]}}, "space.lr: got loguniform, wants one of uniform, log_uniform"),
        ({"lr": {"log_uniform": [0, 2]}}, "bounds above 0"),
        ({"lr": {"uniform": [2, 1]}}, "low < high"),
        ({"n": {"int": [1, 2.5]}}, "whole numbers"),
        ({"n": {"choice": 3}}, "choice wants a list"),
        ({}, "names no field"),
    ],
)
def test_a_space_that_is_none_is_refused(field: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        tune_space(field)


def test_a_grid_wants_choices() -> None:
    with pytest.raises(SpecError, match="a grid wants a choice"):
        grid_points({"lr": {"uniform": [0, 1]}})


def test_numbers_that_yaml_reads_as_text_are_numbers() -> None:
    assert tune_space({"lr": {"log_uniform": ["1e-4", "1e-2"]}})["lr"].lower == 1e-4


def test_a_trial_that_was_cut_short_keeps_its_name(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "trials.jsonl")
    first.begin({"lr": 1.0})
    first.begin({"lr": 2.0})
    first.end("trial-0000", metric=0.5)
    first.close()

    again = Ledger(tmp_path / "trials.jsonl")

    assert again.begin({"lr": 2.0}).name == "trial-0001"
    assert again.begin({"lr": 3.0}).name == "trial-0002"

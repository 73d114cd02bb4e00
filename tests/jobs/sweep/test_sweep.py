"""Sweeps for real: Ray, Optuna, a local MLflow, and a driver that is killed."""

from __future__ import annotations

import json
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

from tigerbot.errors import TigerError
from tigerbot.runner import run_spec
from tigerbot.runs import read_json
from tigerbot.spec import parse_spec

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


@pytest.mark.soak
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
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["name"]: record["metric"] for record in records if record["event"] == "end"}


def result_of(result: dict[str, Any], name: str) -> float:
    return next(trial["metric"] for trial in result["trials"] if trial["name"] == name)


def test_a_sweep_whose_every_trial_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.syspath_prepend(str(HERE))
    raw = sweep(tmp_path, target="objectives:broken", trials=2, name="broken")

    with pytest.raises(TigerError, match=r"every trial failed: ValueError: this target cannot work"):
        run_spec(parse_spec(raw))

    assert read_json(tmp_path / "broken/state.json", {})["status"] == "failed"


@pytest.mark.soak
def test_a_sweep_learns_from_an_earlier_one_that_it_finds_by_tag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.syspath_prepend(str(HERE))
    run_spec(parse_spec(sweep(tmp_path, trials=6, searcher="random")))
    raw = sweep(tmp_path, name="again", trials=4, warm_start={"tiger.sweep": "bowl"})
    narrow = {"lr": {"log_uniform": [1e-9, 1e-8]}, "kind": {"choice": ["中", "en"]}}

    result = run_spec(parse_spec(raw))
    run_spec(parse_spec(raw | {"name": "elsewhere", "space": narrow, "trials": 1}))

    assert len(read_json(tmp_path / "again/earlier.json", [])) == 6
    assert read_json(tmp_path / "elsewhere/earlier.json", None) == []  # none of them lies in its space
    assert len(result["trials"]) == 4

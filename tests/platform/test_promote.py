"""An alias moves to a model that was measured, with what it was measured by, and back; by a real MLflow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from safetensors.numpy import save_file

from tigerbot.errors import ModelError, TrackingError
from tigerbot.mlflow_server import TrackingServer, serve_tracking
from tigerbot.promote import lines, promote, undo
from tigerbot.registry import register, resolve_alias
from tigerbot.runs import write_json

DEAD = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    started = serve_tracking(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
    yield started
    started.stop()


def trained(storage: Path, name: str, server: TrackingServer, *, loss: float | None = 1.5, **state: Any) -> Path:
    """A finished run of `kind: train`, as it lies in its folder and in MLflow."""
    folder = storage / name
    (folder / "model").mkdir(parents=True)
    save_file({"weight": np.ones(3, dtype=np.float32)}, folder / "model/model.safetensors")
    (folder / "model/config.json").write_text("{}")
    spec = {"kind": "train", "name": name, "tracking": {"uri": server.url, "experiment": "town"}}
    write_json(folder / "spec.json", {"spec": spec})
    write_json(folder / "state.json", {"status": "done", "ended": 100.0, "result": {"validation_loss": loss}} | state)
    api = MlflowClient(server.url)
    experiment = api.get_experiment_by_name("town")
    number = experiment.experiment_id if experiment else api.create_experiment("town")
    api.create_run(number, tags={"tiger.folder": str(folder.absolute()), "tiger.kind": "train"}, run_name=name)
    return folder


def evaluated(storage: Path, name: str, ended: float) -> None:
    (storage / name).mkdir()
    write_json(storage / name / "spec.json", {"spec": {"kind": "eval", "name": name}})
    write_json(storage / name / "state.json", {"status": "done", "ended": ended, "result": {"accuracy": 0.83}})


def test_an_alias_moves_with_its_evaluation_and_back_and_remembers(tmp_path: Path, server: TrackingServer) -> None:
    for name in ("first", "second"):
        trained(tmp_path, name, server)
    evaluated(tmp_path, "town-eval", ended=200.0)

    assert "held-out loss 1.5" in promote(tmp_path, "first", "factual")
    said = promote(tmp_path, "second", "factual", "town-eval")

    assert "second" in said and "evaluation town-eval" in said
    assert resolve_alias(server.url, "factual") == tmp_path / "second/model"
    version = MlflowClient(server.url).get_model_version_by_alias("tiger", "factual")
    assert json.loads(version.tags["tiger.evaluation"])["result"] == {"accuracy": 0.83}

    undo(server.url, "factual")
    assert resolve_alias(server.url, "factual") == tmp_path / "first/model"
    with pytest.raises(TrackingError, match="was nowhere before"):
        undo(server.url, "factual")
    told = list(lines(server.url, "factual"))
    assert [("taken back" in line, "second" in line) for line in told] == [(False, False), (True, True)]

    promote(tmp_path, "second", "factual")
    undo(server.url, "factual")
    assert resolve_alias(server.url, "factual") == tmp_path / "first/model"


def test_what_a_job_said_late_does_not_take_an_alias_back(tmp_path: Path, server: TrackingServer) -> None:
    api = MlflowClient(server.url)
    runs = [api.create_run("0").info.run_id for _ in range(2)]
    register(api, runs[0], "/models/a", "base", at=1)
    register(api, runs[1], "/models/b", "base", at=2)

    register(api, runs[0], "/models/a", "base", at=1)

    assert resolve_alias(server.url, "base") == Path("/models/b")


def test_an_alias_that_mlflow_does_not_take_is_one_clear_line(tmp_path: Path, server: TrackingServer) -> None:
    trained(tmp_path, "named", server)

    with pytest.raises(TrackingError, match="MLflow does not do it"):
        promote(tmp_path, "named", "latest")
    assert list(lines(server.url, "nobody")) == ["nobody was nowhere yet"]


def test_a_server_that_is_dead_and_a_database_that_is_not_there_are_one_clear_line(
    tmp_path: Path, server: TrackingServer
) -> None:
    folder = trained(tmp_path, "orphan", server)
    write_json(folder / "spec.json", {"spec": {"kind": "train", "tracking": {"uri": DEAD, "experiment": "town"}}})
    absent = f"sqlite:///{tmp_path}/nowhere/mlflow.db"

    with pytest.raises(TrackingError, match="MLflow does not do it"):
        promote(tmp_path, "orphan", "factual")
    with pytest.raises(TrackingError, match="there is no such database"):
        undo(absent, "factual")
    assert not (tmp_path / "nowhere").exists()


def damaged(folder: Path) -> None:
    (folder / "model/model.safetensors").write_bytes(b"\x10" * 20)


@pytest.mark.parametrize(
    ("about", "spoil", "said"),
    [
        ({"status": "running"}, None, "is running, not done"),
        ({"loss": None}, None, "was never measured"),
        ({"loss": float("nan")}, None, "has a held-out loss of nan"),
        ({}, damaged, "is damaged"),
    ],
)
def test_a_model_whose_checks_are_missing_is_refused(
    tmp_path: Path, server: TrackingServer, about: dict[str, Any], spoil: Any, said: str
) -> None:
    folder = trained(tmp_path, "weak", server, **about)
    if spoil:
        spoil(folder)

    with pytest.raises(ModelError, match=said):
        promote(tmp_path, "weak", "weak")

    with pytest.raises(TrackingError):
        resolve_alias(server.url, "weak")


def test_an_evaluation_from_before_the_model_is_refused(tmp_path: Path, server: TrackingServer) -> None:
    trained(tmp_path, "newer", server)
    evaluated(tmp_path, "old-eval", ended=50.0)

    with pytest.raises(ModelError, match="over before this model was trained"):
        promote(tmp_path, "newer", "newer", "old-eval")

"""`tiger run` with islands: the derived specs, and one whole run of two islands whose first dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from small_corpus import Corpus, as_file, as_train

from tigerbot.errors import SpecError
from tigerbot.models import load_model
from tigerbot.runs import Run, read_json
from tigerbot.spec import spec_hash
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.islands import run as islands_run
from tigerbot_jobs.train.islands.run import derived
from tigerbot_jobs.train.metrics import read_rows
from tigerbot_jobs.train.model import make_model


def job_of(corpus: Corpus, folder: Path, name: str = "both", **changes: object) -> WorkerJob:
    spec = as_train(corpus.spec(name, folder) | {"islands": {"count": 2, "every": 4}} | changes)
    shards = [(corpus.folder / "tokens/train", 0.5)]
    return WorkerJob(spec, spec_hash(spec), str(folder), shards, [corpus.folder / "tokens/held-out"], 1)


def test_an_islands_spec_is_a_run_of_its_own_inside_the_whole_one(corpus: Corpus, tmp_path: Path) -> None:
    job = job_of(corpus, tmp_path, register_as="base", deepspeed={"zero_stage": 2, "small": 1e-6})

    specs = [derived(job, island, 2) for island in (0, 1)]

    assert [spec.name for spec in specs] == ["both.island-0", "both.island-1"]
    assert {spec.storage.uri for spec in specs} == {f"{tmp_path}/both/islands"}
    assert [spec.islands.member for spec in specs if spec.islands] == [0, 1]
    assert all(spec.register_as is None and spec.train == job.spec.train for spec in specs)
    assert specs[0].data.train[0].weight == 0.5


def test_a_name_that_leaves_no_room_for_the_islands_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="name"):
        derived(job_of(corpus, tmp_path, "x" * 60), 0, 2)


def test_a_fleet_restarts_the_island_that_died_and_gives_the_global_model(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = str(Path(__file__).with_name("stub_island.py"))

    def spawn(words: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        command = [stub, words[-1]] if words[0] == "tigerbot.cli" else ["-m", *words]
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *command], env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
            )

    monkeypatch.setattr(islands_run, "spawn", spawn)
    folder = tmp_path / "both"
    folder.mkdir()
    job = job_of(corpus, tmp_path, islands={"count": 2, "every": 2, "outer_lr": 1.0, "outer_momentum": 0.0})
    run, rows = Run(job.spec, job.hash, folder), []

    with islands_run._Fleet(run, job, rows.append) as fleet:
        fleet.follow()
    result = islands_run._finish(run, job, fleet)

    assert "both.island-1 ended (exit 1); it is started again and joins the others" in capsys.readouterr().out
    assert result["given_up"] == [] and result["steps"] == 6 and result["tokens"] == 3072
    assert rows[-1]["step"] == 6 and rows[-1]["tokens"] == 3072
    moved = (
        load_model(folder / "model").get_input_embeddings().weight - make_model(job.spec).get_input_embeddings().weight
    )
    assert torch.allclose(moved, moved.mean(), atol=1e-3) and 0.05 < float(moved.mean()) < 0.13


@pytest.mark.soak
def test_a_run_whose_island_is_killed_ends_with_the_global_model(corpus: Corpus, tmp_path: Path) -> None:
    raw = corpus.spec("both", tmp_path, tokens=60 * 256) | {"islands": {"count": 2, "every": 5}}
    command = [sys.executable, "-m", "tigerbot.cli", "run", str(as_file(raw, tmp_path))]

    with (tmp_path / "said").open("w") as said:
        run = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            until = time.monotonic() + 240
            metrics = tmp_path / "both/islands/both.island-1/metrics.jsonl"
            while not read_rows(metrics) or read_rows(metrics)[-1]["step"] < 8:
                assert time.monotonic() < until and run.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.1)
            os.kill(island_process(run.pid, 1), signal.SIGKILL)
            assert run.wait(400) == 0, (tmp_path / "said").read_text()
        finally:
            run.terminate()
            run.wait()

    result = read_json(tmp_path / "both/state.json", {})["result"]
    assert result["given_up"] == [] and result["steps"] == 30 and result["tokens"] == 60 * 256
    assert result["validation_loss"] < read_rows(tmp_path / "both/metrics.jsonl")[0]["loss"]
    assert "it is started again and joins the others" in (tmp_path / "said").read_text()
    assert load_model(tmp_path / "both/model").num_parameters() > 0
    assert not psutil.pid_exists(run.pid)


def island_process(parent: int, island: int) -> int:
    children = psutil.Process(parent).children()
    return next(child.pid for child in children if f"island-{island}.yaml" in " ".join(child.cmdline()))

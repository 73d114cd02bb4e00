"""A light trial of a train spec: cut short, it goes on from what it kept, with the losses it would have had."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_corpus import Corpus, as_file, as_train, kill_driver

from tigerbot_jobs.train.recovery.keeper import SHM
from tigerbot_jobs.train.recovery.run import run_id_of

STORY = """
import json, sys
from pathlib import Path
from tigerbot.spec import parse_spec
from tigerbot_jobs.sweep.space import Space
from tigerbot_jobs.sweep.target import load_target
from tigerbot_jobs.sweep.worker import NEVER, Answer, Kept, Point, Report, Stopped, Task

raw = {"kind": "sweep", "name": "s", "target": sys.argv[1], "space": {"train.lr": {"choice": [1e-3]}}}
spec = parse_spec(raw | {"metric": "validation_loss"})
target = load_target(spec, Space(spec.space), threads=1, folder=Path(sys.argv[1]).parent)

def trial(kept, end):
    points, states = {}, []
    def say(event):
        if isinstance(event, Kept):
            states.append(event.state)
        elif isinstance(event, Point):
            points[event.step] = event.metrics["loss"]
            if event.step == end:
                raise Stopped
    report = Report(Task("t", {}, 0, "none", kept, NEVER, Path("/dev/null")), say, Answer)
    try:
        target({"train.lr": 1e-3}, report)
    except Stopped:
        pass
    return points, states

import tigerbot_jobs.train.loop as loop
trained, one_step = [], loop.RankRun._one_step
loop.RankRun._one_step = lambda self: (trained.append(self.step + 1), one_step(self))[1]

whole, _ = trial(None, 99)
before, states = trial(None, 7)
trained.clear()
after, _ = trial(states[-1], 99)
print(json.dumps([whole, before, after, trained[0] - 1]))
"""


@pytest.mark.soak
def test_a_light_trial_goes_on_from_its_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    path = as_file(corpus.spec("t", tmp_path), tmp_path)

    told = subprocess.run([sys.executable, "-c", STORY, str(path)], check=True, capture_output=True, text=True)

    whole, before, after, rows = json.loads(told.stdout.splitlines()[-1])
    assert list(before) == [str(step) for step in range(1, 8)]
    assert {**before, **after} == whole and len(whole) == 12
    assert rows == 6  # steps 1 to 6 were read from the checkpoint, not trained again


def heavy(corpus: Corpus, folder: Path, **fields: Any) -> Path:
    """A sweep of heavy trials; its spec."""
    raw = {
        "kind": "sweep",
        "name": "heavy",
        "target": str(as_file(corpus.spec("t", folder), folder)),
        "trial": "heavy",
        "searcher": "grid",
        "max_concurrent": 1,
        "storage": {"uri": str(folder)},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    return as_file(raw | fields, folder / "specs")


@contextmanager
def running(spec: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-m", "tigerbot.cli", "run", str(spec)], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_driver(process)


def lines(path: Path) -> list[dict[str, Any]]:
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def workers_of(trial: Path) -> list[int]:
    return [event["pid"] for event in lines(trial / "ledger.jsonl") if event["kind"] == "worker_ready"]


def in_memory(trial: Path) -> bool:
    about = json.loads((trial / "spec.json").read_text())
    return (SHM / f"tiger-{run_id_of(as_train(about['spec']), about['hash'])}").exists()


@pytest.mark.soak
def test_heavy_trials_are_training_runs_that_a_scheduler_stops(corpus: Corpus, tmp_path: Path) -> None:
    spec = heavy(
        corpus,
        tmp_path,
        space={"train.lr": {"choice": [3e-3, 1e-8, 1e-9]}},
        scheduling={"grace": 3, "reduction": 3},
        trials=3,
    )

    with running(spec) as process:
        assert process.wait(timeout=280) == 0

    result = json.loads((tmp_path / "heavy/state.json").read_text())["result"]
    assert [trial["status"] for trial in result["trials"]] == ["done", "stopped", "stopped"]
    assert result["params"] == {"train.lr": 3e-3}
    trials = tmp_path / "heavy/trials"
    assert (trials / "trial-0000/model").is_dir()
    assert len({tuple(workers_of(trials / trial["name"])) for trial in result["trials"]}) == 1  # the same process
    assert not any(in_memory(trial) for trial in trials.glob("trial-*"))


@pytest.mark.soak
def test_a_worker_that_dies_in_a_later_trial_is_replaced_and_nothing_of_the_first_trial_shows(
    corpus: Corpus, tmp_path: Path
) -> None:
    space = {"train.validate_every": {"choice": [4, 6, 12]}}  # of which the losses know nothing
    second = tmp_path / "heavy/trials/trial-0001"
    with running(heavy(corpus, tmp_path, space=space, scheduler="none", trials=3)) as process:
        until = time.monotonic() + 200
        while not any(event["kind"] == "persisted" for event in lines(second / "ledger.jsonl")):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)

        os.kill(workers_of(second)[0], signal.SIGKILL)

        assert process.wait(timeout=200) == 0
    points = [record for record in lines(tmp_path / "heavy/trials.jsonl") if record["event"] == "point"]
    losses = [{p["step"]: p["value"] for p in points if p["name"] == f"trial-000{n}"} for n in range(3)]
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 12
    first, after = workers_of(second)
    assert first != after and workers_of(tmp_path / "heavy/trials/trial-0002") == [after]


@pytest.mark.soak
def test_a_heavy_member_of_a_population_goes_on_from_the_checkpoint_of_a_better_one(
    corpus: Corpus, tmp_path: Path
) -> None:
    spec = heavy(
        corpus,
        tmp_path,
        space={"train.lr": {"choice": [3e-3, 1e-8]}},
        scheduler="pbt",
        scheduling={"interval": 4, "quantile": 0.5},
        trials=2,
        max_concurrent=2,
    )

    with running(spec) as process:
        assert process.wait(timeout=280) == 0

    records = lines(tmp_path / "heavy/trials.jsonl")
    first, *_, last = [record for record in records if record["event"] == "exploit"] * 2
    assert (first["name"], first["from"], first["before"]) == ("trial-0001", "trial-0000", {"train.lr": 1e-8})
    run = tmp_path / "heavy/trials/trial-0001"
    assert json.loads((run / "spec.json").read_text())["spec"]["train"]["lr"] == last["after"]["train.lr"]
    at = json.loads((run / "taken.json").read_text())["step"]
    restored = [(e["tier"], e["step"]) for e in lines(run / "ledger.jsonl") if e["kind"] == "restored"]
    assert restored[0] == ("storage", at) and at % 4 == 0

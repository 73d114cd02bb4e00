"""A light trial of a train spec: cut short, it goes on from what it kept, with the losses it would have had."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_corpus import Corpus, as_file

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


@pytest.mark.soak
def test_heavy_trials_are_training_runs_that_a_scheduler_stops(corpus: Corpus, tmp_path: Path) -> None:
    path = as_file(corpus.spec("t", tmp_path), tmp_path)
    raw = {
        "kind": "sweep",
        "name": "heavy",
        "target": str(path),
        "trial": "heavy",
        "space": {"train.lr": {"choice": [3e-3, 1e-8, 1e-9]}},
        "searcher": "grid",
        "scheduling": {"grace": 3, "reduction": 3},
        "trials": 3,
        "max_concurrent": 1,
        "storage": {"uri": str(tmp_path)},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }
    spec = as_file(raw, tmp_path / "specs")

    subprocess.run([sys.executable, "-m", "tigerbot.cli", "run", str(spec)], check=True, timeout=280)

    result = json.loads((tmp_path / "heavy/state.json").read_text())["result"]
    assert [trial["status"] for trial in result["trials"]] == ["done", "stopped", "stopped"]
    assert result["params"] == {"train.lr": 3e-3}
    assert (tmp_path / "heavy/trials/trial-0000/model").is_dir()

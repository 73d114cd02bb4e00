"""`tiger runs` and `tiger status`: what lies there, what lives, what may go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tigerbot.cli import app
from tigerbot.errors import InputError
from tigerbot.listing import collect, compared, delete, listed
from tigerbot.living import living, stop_run
from tigerbot.runs import Run, open_run, write_json
from tigerbot.spec import parse_spec
from tigerbot.storage import open_store
from tigerbot.verbs_runs import register

register(app)


def run_of(storage: Path, name: str, tokens: int = 100, **result: Any) -> Run:
    raw = {"kind": "train", "name": name, "model": {"preset": "tiny"}, "data": {"train": [{"path": "t"}]}}
    spec = parse_spec(raw | {"train": {"tokens": tokens}, "storage": {"uri": str(storage)}})
    run = open_run(spec)
    if result:
        run.finish(result)
        run.close()
    return run


def tiger(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def test_runs_are_listed_with_their_state(tmp_path: Path) -> None:
    run_of(tmp_path, "a", loss=1.5)
    working = run_of(tmp_path, "b")
    run_of(tmp_path, "c").close()

    assert [(one.name, one.state) for one in listed(tmp_path)] == [
        ("a", "done"),
        ("b", "running"),
        ("c", "interrupted"),
    ]
    assert "loss 1.5" in tiger("runs", "--in", str(tmp_path)).stdout
    working.close()


def test_two_runs_are_compared_in_spec_and_result(tmp_path: Path) -> None:
    run_of(tmp_path, "a", loss=1.5)
    run_of(tmp_path, "b", tokens=200, loss=1.25)

    assert compared(tmp_path, ("a", "b")) == [
        "result.loss: 1.5 | 1.25",
        "spec.name: a | b",
        "spec.train.tokens: 100 | 200",
    ]
    with pytest.raises(InputError, match=r"no run is called 'x' \(there is: a, b\)"):
        compared(tmp_path, ("a", "x"))


def test_a_deleted_run_is_gone_and_one_that_is_worked_on_stays(tmp_path: Path) -> None:
    run_of(tmp_path, "a", loss=1.5)
    working = run_of(tmp_path, "b")

    assert tiger("runs", "delete", "a", "--in", str(tmp_path)).exit_code == 1  # nobody said yes
    assert delete(tmp_path, "a") > 0 and [one.name for one in listed(tmp_path)] == ["b"]
    with pytest.raises(InputError, match="works on it; tiger stop b"):
        delete(tmp_path, "b")
    working.close()


def test_old_checkpoints_of_finished_runs_are_collected(tmp_path: Path) -> None:
    for name in ("a", "b"):
        source = tmp_path / "source"
        source.mkdir(exist_ok=True)
        (source / "x").write_text(name)
        for step in range(3):
            open_store(str(tmp_path)).commit_folder(source, f"{name}/checkpoints/step-{step:08d}")
    run_of(tmp_path, "a", loss=1.0)
    working = run_of(tmp_path, "b")

    assert collect(tmp_path, keep=1) == [("a", 2)]
    assert open_store(str(tmp_path)).committed("a/checkpoints") == ["a/checkpoints/step-00000002"]
    assert len(open_store(str(tmp_path)).committed("b/checkpoints")) == 3
    working.close()


def test_what_lives_says_its_step_and_stops_when_asked(tmp_path: Path) -> None:
    story = (
        "import signal, sys, time, pathlib; sys.path.insert(0, sys.argv[1]); import test_listing as t\n"
        "run = t.run_of(pathlib.Path(sys.argv[2]), 'alive')\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", story, str(Path(__file__).parent), str(tmp_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline()
    (tmp_path / "alive/metrics.jsonl").write_text('{"step": 7, "loss": 2.5, "tokens": 7000}\n{"step": 8, "lo')
    run_of(tmp_path, "idle", loss=1.0)

    (one,) = living(tmp_path)
    assert one.pid == process.pid and "step 7, tokens 7,000, loss 2.500" in one.line()
    write_json(tmp_path / "alive/endpoint.json", {"url": "http://127.0.0.1:9"})
    assert "http://127.0.0.1:9 does not answer" in tiger("status", "--in", str(tmp_path)).stdout
    stop_run(one, deadline_s=20)

    assert process.wait(timeout=10) == 0 and not living(tmp_path)

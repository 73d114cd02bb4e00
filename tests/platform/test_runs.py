"""A run's identity: the same name and spec is the same run, another spec is refused, --replace keeps the old one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tigerbot.errors import IdentityError
from tigerbot.runs import Run, holder, open_run, read_json
from tigerbot.spec import parse_spec


def spec(storage: Path, **fields: Any) -> Any:
    raw = {
        "kind": "train",
        "name": "x",
        "model": {"preset": "tiny"},
        "data": {"train": [{"path": "t"}]},
        "train": {"tokens": 100},
        "storage": {"uri": str(storage)},
    }
    return parse_spec(raw | fields)


def ended(run: Run) -> None:
    run.finish({"loss": 1.0})
    run.close()


def test_the_same_spec_again_is_the_same_run_and_shows_its_result(tmp_path: Path) -> None:
    ended(open_run(spec(tmp_path)))

    again = open_run(spec(tmp_path, scale={"workers": 4}))

    assert again.done and again.state["result"] == {"loss": 1.0}
    again.close()


def test_another_spec_under_the_name_is_refused_with_the_difference(tmp_path: Path) -> None:
    ended(open_run(spec(tmp_path)))

    with pytest.raises(IdentityError, match=r"train.tokens: 100 -> 200.*--replace"):
        open_run(spec(tmp_path, train={"tokens": 200}))

    assert holder(tmp_path / "x") is None


def test_replace_begins_anew_and_keeps_the_old_one(tmp_path: Path) -> None:
    ended(open_run(spec(tmp_path)))

    fresh = open_run(spec(tmp_path, train={"tokens": 200}), replace=True)

    assert fresh.state["status"] == "running"
    kept = next(tmp_path.glob("x.replaced-*"))
    assert read_json(kept / "state.json", {})["result"] == {"loss": 1.0}
    fresh.close()


def test_a_run_that_is_extended_goes_on_under_the_hash_its_checkpoints_bear(tmp_path: Path) -> None:
    first = open_run(spec(tmp_path))
    ended(first)
    more = spec(tmp_path, train={"tokens": 200})

    with pytest.raises(IdentityError, match=r"train.tokens: 100 -> 200.*--extend to go on to that"):
        open_run(more)
    longer = open_run(more, extend=True)

    assert longer.hash == first.hash and longer.identity != first.hash
    assert longer.state["status"] == "running"
    ended(longer)
    again = open_run(more)
    assert again.done and again.hash == first.hash
    again.close()
    longest = open_run(spec(tmp_path, train={"tokens": 300}), extend=True)
    assert longest.hash == first.hash
    longest.close()


@pytest.mark.parametrize("change", [{"tokens": 50}, {"tokens": 200, "lr": 0.5}])
def test_only_more_of_the_same_is_an_extension(tmp_path: Path, change: dict[str, Any]) -> None:
    ended(open_run(spec(tmp_path)))

    with pytest.raises(IdentityError, match="exists with another spec") as refused:
        open_run(spec(tmp_path, train=change), extend=True)

    assert "--extend" not in str(refused.value)
    assert holder(tmp_path / "x") is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trials": 9}, r"trials: 5 -> 9\).*--extend to go on to that"),
        ({"budget": {"hours": 2}}, r"budget.hours: 1.0 -> 2.0\).*--extend to go on to that"),
        ({"budget": {}}, r"budget.hours: 1.0 -> None\).*--extend to go on to that"),
        ({"trials": 4}, r"trials: 5 -> 4\); give it another name"),
        (
            {"trials": 9, "space": {"lr": {"uniform": [0, 2]}}},
            r"space.lr.uniform: \[0, 1\] -> \[0, 2\].*; give it another",
        ),
    ],
)
def test_a_sweep_is_extended_by_trials_and_budget_alone(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    raw: dict[str, Any] = {"kind": "sweep", "name": "x", "target": "a:b", "space": {"lr": {"uniform": [0, 1]}}}
    raw |= {"trials": 5, "budget": {"hours": 1}, "storage": {"uri": str(tmp_path)}}
    ended(open_run(parse_spec(raw)))
    other = parse_spec(raw | change)

    with pytest.raises(IdentityError, match=said):
        open_run(other)

    if "--extend" in said:
        longer = open_run(other, extend=True)
        assert longer.state["status"] == "running"
        longer.close()


def test_two_processes_cannot_work_on_one_run(tmp_path: Path) -> None:
    mine = open_run(spec(tmp_path))
    assert holder(mine.folder) == os.getpid()
    story = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_runs, pathlib\n"
        "from tigerbot.errors import IdentityError\n"
        "try:\n    test_runs.open_run(test_runs.spec(pathlib.Path(sys.argv[2])))\n"
        "except IdentityError as error:\n    print(error)"
    )

    done = subprocess.run(
        [sys.executable, "-c", story, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(os.environ),
    )

    assert f"another process is working on this run (process {os.getpid()})" in done.stdout
    mine.close()


def test_a_run_that_another_machine_works_on_names_it_and_no_process_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        there.setattr("socket.gethostname", lambda: "node-7")
        theirs = open_run(spec(tmp_path))

    with pytest.raises(IdentityError, match=rf"\(process {os.getpid()} on node-7\)"):
        open_run(spec(tmp_path))

    assert holder(theirs.folder) == 0  # `tiger stop` must not kill whoever has that number here
    theirs.close()


def test_a_state_that_was_cut_off_is_a_new_run(tmp_path: Path) -> None:
    run = open_run(spec(tmp_path))
    run.close()
    (tmp_path / "x/state.json").write_text('{"status": "do')

    again = open_run(spec(tmp_path))

    assert again.state["status"] == "running"
    again.close()

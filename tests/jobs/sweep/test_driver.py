"""A driver and real workers: trials that fail in every way, are restored, copy each other, and cost what they may."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tigerbot.errors import SpecError, TigerError
from tigerbot.spec import SweepSpec, parse_spec
from tigerbot_jobs.sweep.course import Course, scheduler_of
from tigerbot_jobs.sweep.crew import Crew
from tigerbot_jobs.sweep.driver import Driver
from tigerbot_jobs.sweep.follow import Follow
from tigerbot_jobs.sweep.journal import Journal
from tigerbot_jobs.sweep.searchers import searcher_of
from tigerbot_jobs.sweep.space import Space
from tigerbot_jobs.sweep.states import States
from tigerbot_jobs.sweep.target import load_target

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def ray_here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=":")
        patch.syspath_prepend(str(HERE))
        from tigerbot.cluster import connect

        cluster = connect(None, num_cpus=3)
        yield
        cluster.stop()
    sys.modules.pop("objectives", None)


class Nowhere:
    """In place of MLflow, which has tests of its own: remembers what was said."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []
        self.key = ""

    def run(self, name: str, **about: Any) -> Nowhere:
        return self

    def log(self, metrics: dict[str, float], step: int, at: float | None) -> None:
        self.said.append(("log", metrics))

    def tag(self, **tags: str) -> None:
        self.said.append(("tag", tags))

    def finish(self, status: str) -> None:
        self.said.append(("finish", status))


class Sweep:
    """One life of a driver over a folder."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        raw = {"kind": "sweep", "name": "walks", "target": "objectives:walk", "trials": 4, "scheduler": "none"}
        raw |= {"space": {"x": {"uniform": [-1, 1]}}, "searcher": "random"} | fields
        spec = parse_spec(raw)
        assert isinstance(spec, SweepSpec)
        space = Space(spec.space)
        target = load_target(spec, space, threads=1, folder=folder)
        self.told: Any = Nowhere()
        self.folder, self.journal = folder, Journal(folder)
        self.course = Course(spec, space, searcher_of(spec, space), scheduler_of(spec))
        self.crew = Crew(target, cpus=1, gpus=0, within=True, environment={})
        self.driver = Driver(
            spec,
            folder,
            course=self.course,
            journal=self.journal,
            follow=Follow(spec, self.told, self.told, {}),
            crew=self.crew,
            states=States(folder / "states"),
            shrink=target.shrunk,
            listen=lambda record: None,
            on_end=lambda: None,
        )

    def run(self) -> Sweep:
        try:
            self.driver.restore()
            self.spent = self.driver.run()
        finally:
            self.journal.close()
        return self

    def ends(self) -> dict[str, tuple[str, str]]:
        return {t.name: (t.status, t.cause) for t in self.course.trials.values()}

    def records(self, event: str) -> list[dict[str, Any]]:
        lines = (self.folder / "trials.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["event"] == event]


def all_alike(folder: Path, fail: str, status: str, cause: str, **fields: Any) -> Sweep:
    params = {"fail": fail, "folder": str(folder)} | fields.pop("params", {})
    swept = Sweep(folder, trials=2, params=params, **fields).run()
    assert set(swept.ends().values()) == {(status, cause)}
    return swept


def test_a_worker_that_dies_costs_nothing_that_was_kept(tmp_path: Path) -> None:
    swept = all_alike(tmp_path, "dies once", "done", "")

    steps = [record["step"] for record in swept.records("point") if record["name"] == "trial-0001"]
    begun = [(r["attempt"], r["after"]) for r in swept.records("begin") if r["name"] == "trial-0001"]

    assert steps == [1, 2, 3, 4, 5, 6] and begun == [(1, ""), (2, "process")]


def test_a_trial_whose_every_process_dies_is_given_up(tmp_path: Path) -> None:
    swept = all_alike(tmp_path, "dies", "failed", "process")

    assert max(record["attempt"] for record in swept.records("begin")) == 4


def test_out_of_memory_is_tried_once_more_with_half_the_micro_batch(tmp_path: Path) -> None:
    enough = all_alike(tmp_path / "a", "memory", "done", "", params={"micro_batch": 4})
    little = all_alike(tmp_path / "b", "memory", "failed", "memory", params={"micro_batch": 16})

    changes = [{}, {"micro_batch": 2, "accumulation": 2}]
    assert [r["changes"] for r in enough.records("begin") if r["name"] == "trial-0000"] == changes
    assert max(record["attempt"] for record in little.records("begin")) == 2


def test_a_value_that_is_no_number_ends_its_trial(tmp_path: Path) -> None:
    swept = all_alike(tmp_path, "nan", "failed", "nan")

    assert [record["step"] for record in swept.records("point")].count(3) == 0
    assert swept.records("end")[0]["error"] == "loss is nan at step 3"


def test_a_step_that_goes_backwards_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept = all_alike(tmp_path, "backwards", "done", "")

    assert all(record["value"] < 9 for record in swept.records("point"))
    assert "reported 1 steps that were not after the one before" in capsys.readouterr().out


def test_a_trial_that_never_returns_is_killed_at_its_deadline(tmp_path: Path) -> None:
    all_alike(tmp_path, "for ever", "killed", "deadline", deadline_s=1.0)


def test_a_trial_that_prints_without_end_fills_no_disk(tmp_path: Path) -> None:
    all_alike(tmp_path, "prints", "done", "")

    printed = (tmp_path / "output/trial-0000.txt").read_text()
    assert len(printed) < 1_100_000 and printed.rstrip().endswith("more characters were left out")


def test_a_trial_whose_output_has_no_room_goes_on_without_it(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    for name in ("trial-0000", "trial-0001"):
        (tmp_path / f"output/{name}.txt").symlink_to("/dev/full")

    all_alike(tmp_path, "prints", "done", "")


def test_a_sweep_whose_first_trials_all_fail_alike_stops_with_that_error(tmp_path: Path) -> None:
    swept = Sweep(tmp_path, trials=50, params={"fail": "bug", "folder": str(tmp_path)}, same_failures=3)

    with pytest.raises(TigerError, match="the first 3 trials all failed alike: KeyError: 'width'"):
        swept.run()

    assert len(swept.records("begin")) <= 4
    assert "misbehave" in (tmp_path / "output/trial-0000.txt").read_text()  # its traceback


def test_a_metric_that_no_trial_reports_is_named_at_the_first(tmp_path: Path) -> None:
    swept = Sweep(tmp_path, target="objectives:silent", trials=50, metric="accuracy")

    with pytest.raises(SpecError, match=r"metric accuracy: trial-000. ended and never reported it.*mean acuracy\?"):
        swept.run()


def test_an_objective_that_no_trial_reports_is_named_at_the_first(tmp_path: Path) -> None:
    swept = Sweep(tmp_path, trials=50, objectives={"plaice": "min"})

    with pytest.raises(
        SpecError,
        match=r"objectives.plaice: trial-000. ended without it; its last report held loss, place; did you mean place\?",
    ):
        swept.run()

    assert not swept.records("end")


def test_a_budget_stops_what_runs_and_a_wider_one_takes_it_up_again(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"trials": 3, "params": {"sleep_s": 0.15}}
    first = Sweep(tmp_path, budget={"card_hours": 0.5 / 3600}, **fields).run()
    second = Sweep(tmp_path, **fields).run()

    assert first.spent == "0.000138889 card-hours" and ("killed", "budget") in first.ends().values()
    assert set(second.ends().values()) == {("done", "")}
    steps = [(record["name"], record["step"]) for record in second.records("point")]
    assert len(steps) == len(set(steps)) == 18


def test_every_configuration_gets_its_seeds(tmp_path: Path) -> None:
    swept = Sweep(tmp_path, trials=6, seeds=3).run()

    begun = swept.records("begin")
    assert [(r["config"], r["seed"]) for r in begun] == [(f"c000{i // 3}", i % 3) for i in range(6)]
    assert len({json.dumps(record["params"]) for record in begun}) == 2


def test_members_of_a_population_go_on_from_the_state_of_better_ones(tmp_path: Path) -> None:
    about = {"scheduler": "pbt", "scheduling": {"interval": 3}, "target": "objectives:member", "trials": 8}
    swept = Sweep(tmp_path, max_concurrent=3, **about).run()

    exploits = swept.records("exploit")
    again = [record for record in swept.records("begin") if record["parent"]]
    # Two that take over at one time may begin again in either order, so each is found by who it is.
    assert exploits and _takeovers(again, "parent", "params") == _takeovers(exploits, "from", "after")
    assert set(swept.ends().values()) == {("done", "")}


def _takeovers(records: list[dict[str, Any]], source: str, params: str) -> list[tuple[str, str, str]]:
    return sorted((r["name"], r[source], json.dumps(r[params], sort_keys=True)) for r in records)


def test_a_population_wants_a_target_that_keeps_its_state(tmp_path: Path) -> None:
    about = {"scheduler": "pbt", "scheduling": {"interval": 1}, "target": "objectives:bowl", "trials": 8}
    space = {"lr": {"log_uniform": [1e-5, 1e-1]}, "kind": {"choice": ["中"]}}

    with pytest.raises(SpecError, match="wants a target that keeps its state"):
        Sweep(tmp_path, max_concurrent=3, space=space, **about).run()


def test_more_trials_at_once_than_the_cluster_holds_run_one_after_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = Sweep(tmp_path, trials=9, max_concurrent=9).run()

    assert "the cluster holds 3 trials at once, not 9" in capsys.readouterr().out
    assert set(swept.ends().values()) == {("done", "")}

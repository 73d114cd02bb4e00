"""Nodes that fail again and again: who is kept out, until when, and how a person sees and undoes it."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tigerbot.cli import main
from tigerbot.errors import InputError
from tigerbot_jobs.commands import nodes_app
from tigerbot_jobs.train.watch.quarantine import HOUR_S, Quarantine, quarantine_of


@dataclass
class WallClock:
    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> WallClock:
    return WallClock()


@pytest.fixture
def nodes(tmp_path: Path, clock: WallClock) -> Quarantine:
    return Quarantine(tmp_path / "runs" / "nodes.json", clock=clock)


def test_two_hardware_faults_in_a_day_take_a_node_out_for_a_day(nodes: Quarantine, clock: WallClock) -> None:
    first = nodes.add("n7", "node", "lost")
    clock.now += 20 * HOUR_S
    second = nodes.add("n7", "corruption", "rank 3 differs")

    assert first is None and second is not None and second.evidence == "2 hardware faults in 24 h (node, corruption)"
    assert list(nodes.active()) == ["n7"]
    clock.now += 24 * HOUR_S
    assert not nodes.active()


def test_what_every_worker_of_a_lost_node_reports_is_one_fault(nodes: Quarantine, clock: WallClock) -> None:
    for _ in range(8):
        clock.now += 5

        assert nodes.add("n7", "node") is None


def test_a_day_and_a_bit_apart_they_are_chance(nodes: Quarantine, clock: WallClock) -> None:
    nodes.add("n7", "node")
    clock.now += 25 * HOUR_S

    assert nodes.add("n7", "node") is None


def test_what_never_heals_is_out_at_once_until_a_person_clears_it(nodes: Quarantine, clock: WallClock) -> None:
    sentence = nodes.add("n7", "memory_error")
    clock.now += 10_000 * HOUR_S

    assert sentence is not None and sentence.until is None and list(nodes.active()) == ["n7"]
    assert nodes.clear("n7") and not nodes.active()


def test_soft_faults_decay_and_count_only_when_they_pile_up(nodes: Quarantine, clock: WallClock) -> None:
    slowly = []
    for _ in range(20):
        slowly.append(nodes.add("n1", "process"))
        clock.now += 6 * HOUR_S
    quickly = []
    for kind in ("process", "hang", "process"):
        quickly.append(nodes.add("n2", kind))
        clock.now += HOUR_S / 3

    assert not any(slowly)
    assert quickly[:2] == [None, None] and quickly[2] is not None and "3 soft faults" in quickly[2].evidence


@pytest.mark.parametrize("kind", ["nan", "spike", "exception", "preemption", "storage"])
def test_what_is_no_nodes_fault_takes_none_out(nodes: Quarantine, kind: str) -> None:
    assert not any(nodes.add("n1", kind) for _ in range(10))


def test_a_cleared_node_begins_anew(nodes: Quarantine, clock: WallClock) -> None:
    nodes.add("n7", "node")
    clock.now += HOUR_S
    nodes.add("n7", "node")
    clock.now += HOUR_S
    nodes.clear("n7")
    clock.now += HOUR_S

    again = nodes.add("n7", "node")

    assert again is None and len(nodes.history()) == 3


def test_a_longer_quarantine_is_not_shortened_by_a_new_fault(nodes: Quarantine, clock: WallClock) -> None:
    nodes.hold("n7", 100, "a person")
    for _ in range(3):
        clock.now += HOUR_S / 4
        nodes.add("n7", "process")

    clock.now += 50 * HOUR_S
    assert list(nodes.active()) == ["n7"]


def test_faults_are_forgotten_after_a_month_and_a_spoilt_file_stops_no_job(
    nodes: Quarantine, clock: WallClock, tmp_path: Path
) -> None:
    nodes.add("n7", "process")
    clock.now += 31 * 24 * HOUR_S
    nodes.add("n8", "process")
    kept = [fault.node for fault in nodes.history()]
    (tmp_path / "runs" / "nodes.json").write_text('{"faults": [')

    nodes.add("n9", "process")

    assert kept == ["n8"] and [fault.node for fault in nodes.history()] == ["n9"]


def blame(path: Path, name: str) -> None:
    for _ in range(20):
        Quarantine(path).add(name, "process")


def test_two_jobs_that_blame_at_once_lose_nothing(tmp_path: Path) -> None:
    path, spawn = tmp_path / "nodes.json", multiprocessing.get_context("fork")
    jobs = [spawn.Process(target=blame, args=(path, f"n{number}")) for number in range(4)]

    for job in jobs:
        job.start()
    for job in jobs:
        job.join()

    assert len(Quarantine(path).history()) == 80


def test_a_person_sees_and_undoes_it(tmp_path: Path) -> None:
    listed = quarantine_of(tmp_path)
    listed.add("n7", "node", "no beat for 6 s")
    tiger = CliRunner()

    held = tiger.invoke(nodes_app, ["quarantine", "n9", "--hours", "3", "--in", str(tmp_path)])
    seen = tiger.invoke(nodes_app, ["--in", str(tmp_path)])
    cleared = tiger.invoke(nodes_app, ["clear", "n9", "--in", str(tmp_path)])
    after = tiger.invoke(nodes_app, ["--in", str(tmp_path)])

    assert held.stdout.startswith("n9 is kept out until 20")
    assert "n9 is kept out until" in seen.stdout and "n7  node  no beat for 6 s" in seen.stdout
    assert cleared.stdout == "n9 is in again\n" and "n9" not in after.stdout


def test_no_hours_are_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["tiger", "nodes", "quarantine", "n9", "--hours", "0", "--in", str(tmp_path)])

    with pytest.raises(SystemExit) as left:
        main()

    assert left.value.code == 2 and "--hours: 0 hours are none" in capsys.readouterr().err
    with pytest.raises(InputError):
        quarantine_of(tmp_path).hold("n9", float("nan"))

"""A ledger's summary for the simulator: of a run that was killed once, from memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tigerbot_jobs.simulate.measured import summarize
from tigerbot_jobs.train.goodput import account
from tigerbot_jobs.train.ledger import Clock, Ledger, read_events


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def written(path: Path, fault: bool) -> Path:
    """40 steps of 0.5 s after 10 s of start; in the middle a death that is seen at once and costs 2 s."""
    time = Time()
    with Ledger(path, clock=Clock(time, time)) as ledger:
        ledger.write("driver_started", name="run", workers=[2, 2], standbys=1)
        time.now += 10
        generation(ledger, 1, 0, "none")
        steps(ledger, time, 1, range(1, 21))
        ledger.write("persisted", step=20, seconds=0.3, size_bytes=10)
        if fault:
            about = {"worker": "w0", "rank": 0, "node": "n", "step": 20, "evidence": "its connection closed"}
            ledger.write("fault_seen", fault="process", **about)
            time.now += 1.5
            generation(ledger, 2, 20, "memory")
        steps(ledger, time, 1 + fault, range(21, 41))
        ledger.write("persisted", step=40, seconds=0.3, size_bytes=10)
        ledger.write("stopped", reason="done", error=None)
    return path


def generation(ledger: Ledger, number: int, step: int, tier: str) -> None:
    ledger.write("generation", generation=number, world_size=2, members=["a", "b"], reason="start")
    ledger.write("group_formed", generation=number, seconds=0.0)
    ledger.write("restored", generation=number, step=step, tier=tier, seconds=0.0)


def steps(ledger: Ledger, time: Time, number: int, which: range) -> None:
    for step in which:
        time.now += 0.5
        ledger.write("steps", generation=number, world_size=2, rows=[[step, 0.5, 0.05, 0.01, 0.0, 0.0, 100]])


def test_a_run_to_which_nothing_happened(tmp_path: Path) -> None:
    found = summarize(account(read_events(written(tmp_path / "ledger.jsonl", fault=False))))

    assert found.wall_s == pytest.approx(30)
    assert found.start_s == pytest.approx(10)
    assert found.step_s == pytest.approx(0.44)
    assert (found.snapshot_every_steps, found.snapshot_block_s) == (1, pytest.approx(0.01))
    assert found.checkpoint_every_s == pytest.approx(10)
    assert found.other_s_per_step == pytest.approx(0.05)
    assert found.faults == ()


def test_a_death_costs_what_it_took_until_the_first_new_step(tmp_path: Path) -> None:
    found = summarize(account(read_events(written(tmp_path / "ledger.jsonl", fault=True))))

    (fault,) = found.faults
    assert (fault.kind, fault.from_memory) == ("process", True)
    assert fault.detect_s == pytest.approx(0.0, abs=0.01)
    assert fault.recover_s == pytest.approx(2.0)
    assert fault.per_hour == pytest.approx(3600 / 31.5)


def test_a_run_without_a_step_says_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.write("driver_started", name="run", workers=[2, 2], standbys=0)

    with pytest.raises(ValueError, match="without a step"):
        summarize(account(read_events(tmp_path / "ledger.jsonl")))

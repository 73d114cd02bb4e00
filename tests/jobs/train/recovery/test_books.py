"""Faults against the budgets: a bug that comes back, and a run that gets no further."""

from __future__ import annotations

from pathlib import Path

from tigerbot_jobs.train.ledger import Ledger, read_events
from tigerbot_jobs.train.recovery.books import Books
from tigerbot_jobs.train.watch.bugs import BugKey

BUG = BugKey("ValueError", "loop.py:_one_step", 7)


def books(folder: Path, max_failures: int = -1) -> Books:
    return Books(Ledger(folder / "ledger.jsonl"), max_failures, lambda event, detail: None)


def rows(*steps: int) -> list[list[float]]:
    return [[float(step), 0.1, 0.0, 0.0, 0.0, 100.0] for step in steps]


def test_a_bug_that_comes_back_stops_the_run_though_rows_of_its_steps_arrive_late(tmp_path: Path) -> None:
    kept = books(tmp_path)
    kept.steps(1, 2, rows(1, 2, 3))
    assert kept.judge(BUG, "ValueError: injected").action == "restart"
    kept.steps(1, 2, rows(4, 5, 6, 7))  # done before the failure, told after it
    kept.steps(2, 2, rows(5, 6, 7))  # from the state before it, again

    assert kept.judge(BUG, "ValueError: injected").action == "stop"


def test_a_bug_with_steps_between_is_not_yet_one(tmp_path: Path) -> None:
    kept = books(tmp_path)
    assert kept.judge(BUG, "ValueError: injected").action == "restart"
    kept.steps(2, 2, rows(8, 9))

    assert kept.judge(BUG, "ValueError: injected").action == "restart"


def test_one_failure_too_many_says_so_and_each_is_in_the_ledger(tmp_path: Path) -> None:
    kept = books(tmp_path, max_failures=1)
    assert kept.fault("process", 1, worker="w0", rank=0, node="n0", evidence="its connection closed") == ""
    assert "max_failures is 1" in kept.fault("process", 2, worker="w1", rank=1, node="n0", evidence="again")
    assert [event.text("worker") for event in read_events(tmp_path / "ledger.jsonl") if event.kind == "fault_seen"] == [
        "w0",
        "w1",
    ]

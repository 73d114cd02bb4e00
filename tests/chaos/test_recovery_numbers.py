"""What a kill cost, read from the lines a run wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.recovery import Recovery, Step, lost_seconds, read_steps, recovery_after


def steady(first: int, count: int, began: float, life: int) -> list[Step]:
    """Steps of 0.1 s."""
    return [Step(first + i, began + 0.1 * (i + 1), life) for i in range(count)]


def test_a_restart_from_a_checkpoint_loses_the_steps_since() -> None:
    steps = steady(1, 50, 0.0, life=1) + steady(41, 30, 10.0, life=2)

    found = recovery_after(steps, killed_at=5.05)

    assert found == Recovery(pytest.approx(5.05), pytest.approx(6.05), 10)  # type: ignore[arg-type]


def test_a_survivor_that_writes_one_more_line_has_not_recovered_by_it() -> None:
    steps = [*steady(1, 50, 0.0, life=1), Step(51, 5.07, 1), *steady(52, 30, 5.5, life=1)]

    found = recovery_after(steps, killed_at=5.05)

    assert found == Recovery(pytest.approx(0.55), pytest.approx(0.55), 0)  # type: ignore[arg-type]


def test_no_recovery_is_reported_before_the_run_is_further_than_it_was() -> None:
    steps = steady(1, 50, 0.0, life=1) + steady(41, 10, 10.0, life=2)

    assert recovery_after(steps, killed_at=5.05) is None
    assert recovery_after(steps[:50], killed_at=5.05) is None


def test_lost_seconds_are_all_but_the_new_steps_at_their_pace() -> None:
    steps = steady(1, 50, 0.0, life=1) + steady(41, 30, 10.0, life=2)

    assert lost_seconds(steps, 12.9) == pytest.approx(12.9 - 69 * 0.1)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "steps").write_text("1 0.5 7\n2 0.6 7\n3 0.")

    assert read_steps(tmp_path / "steps") == [Step(1, 0.5, 7), Step(2, 0.6, 7)]
    assert read_steps(tmp_path / "nothing") == []

"""How often an action may be taken, and in which order timeouts may fire."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pretend_ranks import Clock

from tigerbot.errors import SpecError
from tigerbot_jobs.train.watch.budget import Budget
from tigerbot_jobs.train.watch.ladder import Timeouts, ladder


def test_a_budget_is_spent_and_comes_back_with_time() -> None:
    clock = Clock()
    budget = Budget("replacing a worker", 3, 600, clock=clock)

    taken = [budget.take() for _ in range(4)]
    said = budget.ask()
    clock.now += 200

    assert taken == [True, True, True, False]
    assert said.evidence == "the budget for replacing a worker is spent: 3 in 600 s"
    assert budget.left == 1 and budget.take() and not budget.take()


def test_progress_fills_it_and_steps_done_again_do_not() -> None:
    clock = Clock()
    budget = Budget("rollback", 2, 1e9, steps=100, clock=clock)
    budget.progress(500)
    budget.take()
    budget.take()

    for step in (450, 500, 599):
        budget.progress(step)
    before = budget.left
    budget.progress(600)

    assert (before, budget.left) == (0, 2)


@given(st.lists(st.floats(0, 100), max_size=200))
def test_in_any_stretch_of_time_no_more_is_taken_than_is_allowed(waits: list[float]) -> None:
    clock = Clock()
    budget, times = Budget("x", 4, 60, clock=clock), []

    for wait in waits:
        clock.now += wait
        if budget.take():
            times.append(clock.now)

    # n at once, and n more as they come back
    assert all(sum(begin <= at <= begin + 60 for at in times) <= 8 for begin in times)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="is none"):
        Budget("x", 0, 10)


@given(st.floats(0.1, 10_000))
def test_the_ladder_is_in_order_for_every_phase_deadline(phase_s: float) -> None:
    timeouts = ladder(phase_s)

    assert timeouts.phase_s < timeouts.group_s < timeouts.rendezvous_s < timeouts.health_s < timeouts.job_s


def test_a_bad_order_is_refused_with_both_names_and_a_number_that_would_do() -> None:
    with pytest.raises(SpecError) as refused:
        Timeouts(phase_s=60, group_s=30, rendezvous_s=90, health_s=180, job_s=1800)

    assert str(refused.value) == (
        "fault_tolerance.group_s: 30 s, but phase_s inside it is 60 s; give at least 75 s, or shorten phase_s"
    )
    assert ladder(30).evidence == "phase 30 s < group 60 s < rendezvous 90 s < health 180 s < job 1800 s"


@pytest.mark.parametrize("phase_s", [0, -1, float("nan")])
def test_no_time_at_all_is_refused(phase_s: float) -> None:
    with pytest.raises(SpecError):
        ladder(phase_s)

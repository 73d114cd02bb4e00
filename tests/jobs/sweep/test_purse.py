"""What a sweep may spend is counted over all that runs, and nothing else."""

from __future__ import annotations

import pytest

from tigerbot.spec import SweepSpec, parse_spec
from tigerbot_jobs.sweep.budget import Purse
from tigerbot_jobs.sweep.course import Course, scheduler_of
from tigerbot_jobs.sweep.searchers import searcher_of
from tigerbot_jobs.sweep.space import Space


class Clock:
    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def new_purse(clock: Clock, **fields: object) -> Purse:
    raw = {"kind": "sweep", "name": "s", "target": "m:f", "space": {"x": {"choice": [1]}}, "cpus_per_trial": 2.0}
    spec = parse_spec(raw | fields)
    assert isinstance(spec, SweepSpec)
    space = Space(spec.space)
    return Purse(spec, Course(spec, space, searcher_of(spec, space), scheduler_of(spec)), clock)


def test_what_runs_counts_with_its_cards() -> None:
    clock = Clock()
    purse = new_purse(clock, budget={"card_hours": 2.0})

    purse.begin("trial-0000")
    clock.seconds += 3599
    before = purse.spent()
    clock.seconds += 1

    assert (before, purse.spent()) == ("", "2 card-hours")


def test_a_trial_that_waits_for_a_node_costs_no_cards_but_time() -> None:
    clock = Clock()
    purse = new_purse(clock, budget={"card_hours": 1.0, "hours": 24.0})

    purse.begin("trial-0000")
    clock.seconds += 60
    ran = purse.end("trial-0000")
    clock.seconds += 23 * 3600
    before = purse.spent()
    clock.seconds += 3600

    assert (ran, before, purse.spent()) == (60, "", "24 hours")


@pytest.mark.parametrize(("seconds", "overdue"), [(5.0, False), (5.1, True)])
def test_a_deadline_is_a_trials_own(seconds: float, overdue: bool) -> None:
    clock = Clock()
    purse = new_purse(clock, deadline_s=5.0)

    clock.seconds += 100
    purse.begin("trial-0000")
    clock.seconds += seconds

    assert purse.is_overdue("trial-0000") == overdue and not purse.is_overdue("trial-0001")

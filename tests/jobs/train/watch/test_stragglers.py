"""Slow ranks: who is marked, who is confirmed, and when nobody is."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tigerbot_jobs.train.watch.stragglers import Mark, SlowRanks, confirm


def marks(ranks: int, own_s: Callable[[int, int], float], steps: int = 1000, seed: int = 1) -> list[Mark]:
    """Marks of a run in which rank r takes own_s(r, step) seconds, with heavy-tailed noise on top."""
    chance, slow = random.Random(seed), SlowRanks()
    slow.new_generation([f"w{rank}" for rank in range(ranks)])
    found = []
    for step in range(steps):
        for rank in range(ranks):
            hiccup = 10 if chance.random() < 0.02 else 1
            slow.add(f"w{rank}", own_s(rank, step) * chance.lognormvariate(0, 0.3) * hiccup)
        found += slow.check()
    return found


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_rank_that_takes_twice_as_long_is_marked_after_three_windows(ranks: int) -> None:
    found = marks(ranks, lambda rank, step: 0.2 if rank == 1 else 0.1, steps=150)

    assert [(mark.worker, mark.signal) for mark in found] == [("w1", "relative")]
    assert found[0].relative == pytest.approx(0.5, abs=0.1)


def test_noise_marks_nobody_in_thousands_of_steps() -> None:
    assert not marks(16, lambda rank, step: 0.1, steps=5000)


def test_when_everybody_becomes_slow_nobody_is() -> None:
    assert not marks(8, lambda rank, step: 0.1 if step < 300 else 0.5, steps=1500)


def test_half_the_ranks_on_older_cards_are_no_stragglers() -> None:
    assert not marks(8, lambda rank, step: 0.1 if rank < 4 else 0.25)


def test_a_rank_that_gets_worse_shows_both_signals() -> None:
    found = marks(8, lambda rank, step: 0.3 if rank == 2 and step >= 300 else 0.1)

    assert found and {(mark.worker, mark.signal) for mark in found} == {("w2", "both")}


def test_a_fast_card_that_falls_to_the_others_level_only_got_worse() -> None:
    found = marks(8, lambda rank, step: 0.05 if rank == 2 and step < 300 else 0.1)

    assert found and {(mark.worker, mark.signal) for mark in found} == {("w2", "individual")}


def test_a_slow_minute_is_forgiven() -> None:
    assert not marks(8, lambda rank, step: 0.5 if rank == 2 and 300 <= step < 390 else 0.1)


def test_a_differing_microsecond_is_nothing() -> None:
    assert not marks(8, lambda rank, step: 0.0004 if rank == 1 else 0.0002)


def test_a_new_member_has_no_past() -> None:
    slow = SlowRanks(window=2, windows=2)
    slow.new_generation(["a", "b"])
    for _ in range(2):
        slow.add("a", 0.1)
        slow.add("b", 0.4)
    slow.check()

    slow.new_generation(["a", "c"])
    for _ in range(2):
        slow.add("a", 0.1)
        slow.add("b", 0.4)
        slow.add("c", 0.4)

    assert not slow.check()


def test_a_mark_is_confirmed_by_the_same_work_taking_longer_there() -> None:
    slow, sound = confirm("w1", {"w0": 0.01, "w1": 0.02, "w2": 0.011}), confirm("w1", {"w0": 0.01, "w1": 0.0105})

    assert slow.confirmed and "the machine is slow" in slow.evidence
    assert not sound.confirmed and "uneven" in sound.evidence
    assert not confirm("w1", {"w1": 0.02}).confirmed


@settings(max_examples=30, deadline=None)
@given(
    factors=st.lists(st.floats(0.9, 1.1), min_size=2, max_size=6),
    slowness=st.lists(st.floats(0.5, 20.0), min_size=6, max_size=6),
)
def test_uniform_slowness_of_any_shape_never_marks_anybody(factors: list[float], slowness: list[float]) -> None:
    slow = SlowRanks(window=5)
    slow.new_generation([f"w{rank}" for rank in range(len(factors))])

    found = []
    for together in slowness * 3:
        for _ in range(5):
            for rank, factor in enumerate(factors):
                slow.add(f"w{rank}", 0.1 * factor * together)
        found += slow.check()

    assert not [mark for mark in found if mark.signal != "individual"]
    assert not found

"""Losses that are no numbers or run away, told from those that are only noisy. A run is played step by step."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tigerbot_jobs.train.watch.guard import Keep, LossGuard, Rollback, Skip, Stop, Verdict, newest
from tigerbot_jobs.train.watch.skips import SkipList

Losses = Callable[[int, int, random.Random], tuple[float, float]]


def natural(step: int, batch: int, chance: random.Random) -> tuple[float, float]:
    """A loss that falls from 10 to 3 with noise, and a gradient norm that goes with it."""
    return 3 + 7 * math.exp(-step / 300) + chance.gauss(0, 0.08), 1.0 * chance.lognormvariate(0, 0.3)


@dataclass
class Played:
    """A run under a guard: what it decided, and what it trained on."""

    guard: LossGuard
    verdicts: list[tuple[int, Verdict]] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)

    def play(self, losses: Losses, steps: int, *, seed: int = 0) -> Played:
        chance, step, batches = random.Random(seed), 0, []
        for _ in range(20 * steps):
            if step >= steps:
                break
            batch = self.guard.skips.data_index(step)
            verdict = self.guard.decide(step, *losses(step, batch, chance))
            if not isinstance(verdict, Keep) or verdict.evidence:
                self.verdicts.append((step, verdict))
            if isinstance(verdict, Stop):
                break
            if isinstance(verdict, Rollback):
                step = verdict.to - verdict.to % 10  # snapshots are kept every ten steps
                batches = batches[:step]
                continue
            batches.append(batch)
            step += 1
        self.trained = batches
        return self

    def of(self, kind: type) -> list:
        return [verdict for _, verdict in self.verdicts if isinstance(verdict, kind)]


def test_one_step_that_is_no_number_is_skipped_and_counters_go_on() -> None:
    def losses(step: int, batch: int, chance: random.Random) -> tuple[float, float]:
        return (2.0, math.nan) if batch == 7 else (2.0, 1.0)

    played = Played(LossGuard()).play(losses, 20)

    assert [(step, type(verdict)) for step, verdict in played.verdicts] == [(7, Skip)]
    assert played.trained == list(range(20)) and "step 7 is not applied" in played.of(Skip)[0].evidence


def test_three_in_a_row_go_back_even_in_the_first_steps_and_their_batches_are_never_taken_again() -> None:
    def losses(step: int, batch: int, chance: random.Random) -> tuple[float, float]:
        return (math.inf, 1.0) if 30 <= batch < 35 else (2.0, 1.0)

    played = Played(LossGuard(margin_steps=10)).play(losses, 60)

    (rollback,) = played.of(Rollback)
    assert (rollback.to, rollback.skip, rollback.lr_factor) == (20, (29, 32), 1.0)
    assert len(played.trained) == 60 and not set(played.trained) & set(range(29, 33))


@pytest.mark.parametrize("snapshot_every", [1, 4, 7])
def test_three_in_a_row_are_counted_also_when_each_is_taken_back_to_an_older_snapshot(snapshot_every: int) -> None:
    guard, step, void, verdicts = LossGuard(margin_steps=10), 0, set(), []

    while step < 60:
        if step in void:
            step += 1
            continue
        verdict = guard.decide(step, math.nan if 30 <= step < 40 else 2.0, 1.0)
        verdicts += [] if isinstance(verdict, Keep) else [verdict]
        if isinstance(verdict, Rollback):
            break
        if isinstance(verdict, Skip):
            void.add(step)
            step -= step % snapshot_every  # the state before it is that of the last snapshot
            state, guard = guard.state(), LossGuard(margin_steps=10)
            guard.restore(state, step=step)
            continue
        step += 1

    assert [type(verdict) for verdict in verdicts] == [Skip, Skip, Rollback]


def test_a_bad_step_that_is_sound_when_done_again_ends_the_row() -> None:
    guard = LossGuard()
    for step, loss in ((0, 2.0), (1, math.nan), (2, math.nan), (1, 2.0), (2, 2.0), (3, math.nan)):
        verdict = guard.decide(step, loss, 1.0)

    assert isinstance(verdict, Skip)


def test_a_spike_goes_back_to_before_it_and_training_then_passes() -> None:
    def losses(step: int, batch: int, chance: random.Random) -> tuple[float, float]:
        loss, norm = natural(step, batch, chance)
        return (loss + 4, norm * 8) if 700 <= batch < 704 else (loss, norm)

    played = Played(LossGuard()).play(losses, 1500)

    (rollback,) = played.of(Rollback)
    assert rollback.to == 600 and rollback.skip == (699, 702)
    assert "global batches 699 to 702" in rollback.evidence
    assert len(played.trained) == 1500 and not set(played.trained) & set(range(699, 703))


def test_a_gradient_that_explodes_is_a_spike_before_the_loss_shows_it() -> None:
    def losses(step: int, batch: int, chance: random.Random) -> tuple[float, float]:
        loss, norm = natural(step, batch, chance)
        return (loss, norm * 30) if 500 <= batch < 503 else (loss, norm)

    played = Played(LossGuard()).play(losses, 600)

    assert [step for step, verdict in played.verdicts if isinstance(verdict, Rollback)] == [502]


@pytest.mark.parametrize("seed", range(3))
def test_a_natural_fall_with_noise_never_fires(seed: int) -> None:
    played = Played(LossGuard(warmup_steps=20)).play(natural, 5000, seed=seed)

    assert not played.of(Rollback)


@pytest.mark.parametrize("hard", [0.02, 0.1, 0.3])
def test_a_mixture_of_easy_and_hard_batches_never_fires(hard: float) -> None:
    def losses(step: int, batch: int, chance: random.Random) -> tuple[float, float]:
        loss, norm = natural(step, batch, chance)
        return (loss + 1.5, norm * 3) if chance.random() < hard else (loss, norm)

    played = Played(LossGuard()).play(losses, 10_000, seed=4)

    assert not played.of(Rollback)


def test_an_outlier_or_two_are_only_noted() -> None:
    def losses(step: int, batch: int, chance: random.Random) -> tuple[float, float]:
        return (9.0, 50.0) if batch in (400, 401) else natural(step, batch, chance)

    played = Played(LossGuard()).play(losses, 600)

    assert [step for step, _ in played.verdicts] == [400, 401] and not played.of(Rollback)


def test_a_steep_fall_of_the_first_steps_is_not_read_as_a_spike_later() -> None:
    def losses(step: int, batch: int, chance: random.Random) -> tuple[float, float]:
        return (10 - step / 10, 1.0) if step < 80 else (2 + (step % 7) / 100, 1.0)

    assert not Played(LossGuard()).play(losses, 400).verdicts


def test_at_the_same_place_it_goes_slower_and_then_stops_with_one_sentence() -> None:
    guard, factors = LossGuard(), []

    def losses(step: int, batch: int, chance: random.Random) -> tuple[float, float]:
        factors.append((step, guard.lr_factor(step)))
        loss, norm = natural(step, batch, chance)
        return (loss + 5, norm * 9) if step >= 800 else (loss, norm)

    played = Played(guard).play(losses, 2000)

    assert [verdict.lr_factor for verdict in played.of(Rollback)] == [1.0, 0.5]
    assert (750, 0.5) in factors and (600, 0.5) not in factors
    (stop,) = played.of(Stop)
    assert "gone back from twice" in stop.evidence and "\n" not in stop.evidence


def test_rollbacks_are_bounded_wherever_they_happen() -> None:
    def losses(step: int, batch: int, chance: random.Random) -> tuple[float, float]:
        loss, norm = natural(step, batch, chance)
        return (loss + 5, norm * 9) if batch > 400 and batch % 500 < 3 else (loss, norm)

    played = Played(LossGuard(max_rollbacks=3)).play(losses, 5000)

    assert len(played.of(Rollback)) == 3 and "3 rollbacks" in played.of(Stop)[0].evidence


def test_every_rank_decides_the_same_also_one_that_joined_from_a_checkpoint() -> None:
    def losses(step: int, batch: int, chance: random.Random) -> tuple[float, float]:
        loss, norm = natural(step, batch, chance)
        return (loss + 5, norm * 9) if batch in range(301, 304) or batch == 250 else (loss, norm)

    here, there, chance = LossGuard(), LossGuard(), random.Random(3)
    step, decided = 0, []
    while step < 500:
        numbers = losses(step, here.skips.data_index(step), chance)
        mine = here.decide(step, *numbers)
        theirs = there.decide(step, *numbers)
        decided.append((mine, theirs))
        step = mine.to if isinstance(mine, Rollback) else step + 1
        there = LossGuard()
        there.restore(json.loads(json.dumps(here.state())), step=step)

    assert all(mine == theirs for mine, theirs in decided)
    assert any(isinstance(mine, Rollback) for mine, _ in decided)


def test_after_a_rollback_an_older_checkpoint_does_not_bring_the_skipped_batches_back() -> None:
    guard = LossGuard()
    for step in range(100):
        guard.decide(step, 2.0, 1.0)
    older = guard.state()
    for step in range(100, 103):
        guard.decide(step, math.nan, 1.0)
    later = guard.state()

    resumed = LossGuard()
    resumed.restore(newest([older, later]), step=90)

    assert resumed.skips == SkipList(((99, 102),)) and resumed.state()["sound"][-1][0] == 89


def test_the_state_stays_small() -> None:
    guard = Played(LossGuard()).play(natural, 1000).guard

    assert len(json.dumps(guard.state())) < 20_000


INTERVALS = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 20)).map(lambda one: (one[0], one[0] + one[1])), max_size=12
)


@given(INTERVALS)
def test_steps_take_rising_batches_and_never_a_skipped_one(intervals: list[tuple[int, int]]) -> None:
    skips = SkipList.from_json(intervals)

    taken = [skips.data_index(step) for step in range(400)]

    skipped = {batch for first, last in intervals for batch in range(first, last + 1)}
    assert taken == sorted(set(range(400 + len(skipped))) - skipped)[:400]
    assert len(skips) == len(skipped) and all(batch in skips for batch in skipped)


@given(INTERVALS, st.randoms())
def test_a_skip_list_does_not_depend_on_order_or_repetition_and_survives_json(
    intervals: list[tuple[int, int]], order: random.Random
) -> None:
    shuffled = intervals * 2
    order.shuffle(shuffled)

    skips = SkipList.from_json(intervals)

    assert SkipList.from_json(shuffled) == skips
    assert SkipList.from_json(json.loads(json.dumps(skips.to_json()))) == skips


@given(INTERVALS, st.integers(0, 300), st.integers(0, 30))
def test_what_was_trained_before_an_interval_never_changes_by_skipping_it(
    intervals: list[tuple[int, int]], step: int, length: int
) -> None:
    before = SkipList.from_json(intervals)
    first = before.data_index(step)

    after = before.add(first, first + length)

    assert [after.data_index(earlier) for earlier in range(step)] == [
        before.data_index(earlier) for earlier in range(step)
    ]
    assert after.data_index(step) > first + length


def test_an_interval_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no interval"):
        SkipList().add(5, 4)

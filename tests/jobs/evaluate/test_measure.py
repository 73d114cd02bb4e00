"""Accuracy, diversity and the n-gram floor: numbers whose right value is known."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tigerbot_jobs.evaluate.measure import bootstrap, distinct_valid, paired, per_item
from tigerbot_jobs.evaluate.ngram import NGram


def test_noise_does_not_win_diversity() -> None:
    texts = ["雨落在河上", "雨落在河上", "rain on the river", "xq zzk", "kk qq"]

    assert distinct_valid(texts, [True, True, True, False, False]) == pytest.approx(2 / 5)


def test_a_clear_difference_excludes_zero_and_no_difference_does_not() -> None:
    better = paired([1.0] * 80 + [0.0] * 20, [1.0] * 40 + [0.0] * 60)
    rng = random.Random(1)
    coin = [float(rng.random() < 0.5) for _ in range(100)]

    assert better.low > 0
    assert paired(coin, coin).low <= 0 <= paired(coin, coin).high


def test_an_item_counts_once_however_many_seeds_asked_it() -> None:
    assert per_item(["a", "b", "a", "b"], [1, 0, 0, 0]) == {"a": 0.5, "b": 0.0}


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_an_interval_holds_its_mean(values: list[float]) -> None:
    interval = bootstrap(values, draws=300)

    assert interval.low - 1e-9 <= interval.mean <= interval.high + 1e-9


def test_ngram_probabilities_sum_to_one_after_any_context() -> None:
    rng = random.Random(0)
    model = NGram([[rng.randrange(5) for _ in range(30)] for _ in range(50)], vocab_size=8)

    for context in ([], [0], [7], [1, 2, 3, 4], [7, 7, 7, 7]):
        assert sum(model._probability(context, token) for token in range(8)) == pytest.approx(1.0)


def test_ngram_learns_what_repeats_and_pays_for_what_is_new() -> None:
    model = NGram([[1, 2, 3, 4] * 20], vocab_size=16)

    assert model.bits([1, 2, 3, 4] * 5) / 20 < 0.5
    assert model.bits([9, 9, 9, 9]) / 4 > 3

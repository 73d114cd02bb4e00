"""When a canary's numbers are worse than chance allows, and when they are not."""

from __future__ import annotations

import random
from collections import deque

import pytest

from tigerbot_serve.scale.verdict import Tally, binomial_tail, fisher, together, worse


def tally(answers: int, errors: int = 0, scale: float = 1.0, seed: int = 0) -> Tally:
    chance = random.Random(seed)
    return Tally(answers, errors, deque(scale * chance.lognormvariate(-4, 0.3) for _ in range(answers - errors)))


def judged(canary: Tally, rest: Tally) -> str | None:
    return worse(canary, rest, min_answers=200, slower=1.25)


def test_more_errors_than_chance_allows_take_it_back() -> None:
    assert "errors 4.0% against 0.2%" in (judged(tally(500, 20), tally(5000, 10, seed=1)) or "")


def test_slow_answers_take_it_back() -> None:
    assert "p99" in (judged(tally(500, scale=2.0), tally(5000, seed=1)) or "")


def test_the_same_model_stays() -> None:
    looks = [judged(tally(300, seed=seed), tally(3000, seed=1000 + seed)) for seed in range(200)]

    assert sum(look is not None for look in looks) == 0


def test_a_faster_one_with_fewer_errors_stays() -> None:
    assert judged(tally(500, scale=0.5), tally(5000, 50, seed=1)) is None


@pytest.mark.parametrize(("canary", "rest"), [(199, 5000), (5000, 199)])
def test_few_answers_judge_nothing(canary: int, rest: int) -> None:
    assert judged(tally(canary, errors=canary // 2), tally(rest, seed=1)) is None


def test_the_chances_are_the_textbooks() -> None:
    assert fisher(3, 4, 1, 4) == pytest.approx(17 / 70)  # the lady tasting tea, at least 3 of 4
    assert binomial_tail(2, 3, 0.5) == pytest.approx(0.5)
    assert binomial_tail(0, 10, 0.01) == pytest.approx(1.0)


def test_replicas_numbers_are_put_together() -> None:
    both = together([tally(100, 1), tally(50, 2)])

    assert (both.answers, both.errors, len(both.times)) == (150, 3, 147)

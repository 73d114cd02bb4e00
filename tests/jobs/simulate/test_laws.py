"""What must hold whatever the numbers: monotone in size, recovery and block, bounded, summing to one, repeatable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tigerbot.spec import PolicySpec, SimulateSpec, parse_spec
from tigerbot_jobs.simulate.draws import Draws
from tigerbot_jobs.simulate.outcome import Outcome, simulate
from tigerbot_jobs.simulate.plain import plain_setting
from tigerbot_jobs.simulate.setting import Setting, setting

HOUR = 3600.0
law = settings(max_examples=12, deadline=None, derandomize=True)
hours = st.floats(1, 50)
recoveries = st.floats(1, 1800)
blocks = st.floats(0, 120)


def spec_of(**fields: Any) -> SimulateSpec:
    spec = parse_spec({"kind": "simulate", "name": "x", "cards": 512, "days": 20, **fields})
    assert isinstance(spec, SimulateSpec)
    return spec


def situation(policy: str = "ours", **fields: Any) -> Setting:
    return setting(spec_of(**fields), PolicySpec.model_validate({"preset": policy}))


def found(one: Setting, replicas: int = 200) -> Outcome:
    return simulate(one, replicas=replicas, seed=3)


def plain(m: float, r: float, d: float) -> Setting:
    return plain_setting(mtbf_s=m * HOUR, every_s=900, block_s=d, recovery_s=r, horizon_s=60 * m * HOUR)


def assert_not_better(worse: Outcome, better: Outcome) -> None:
    noise = 2 * (worse.goodput.high - worse.goodput.mean + better.goodput.high - better.goodput.mean)
    assert worse.goodput.mean <= better.goodput.mean + noise


@law
@given(hours, recoveries, blocks, st.floats(1.5, 4))
def test_goodput_falls_with_failures_recovery_and_block(m: float, r: float, d: float, more: float) -> None:
    base = found(plain(m, r, d))

    assert_not_better(found(plain(m / more, r, d)), base)
    assert_not_better(found(plain(m, r * more, d)), base)
    assert_not_better(found(plain(m, r, (d + 1) * more)), base)


@law
@given(hours, recoveries, blocks)
def test_goodput_is_never_above_availability(m: float, r: float, d: float) -> None:
    outcome = found(plain(m, r, d))

    margin = 2 * (outcome.goodput.high - outcome.goodput.mean) + 0.002
    assert outcome.goodput.mean <= m * HOUR / (m * HOUR + r) + margin


@law
@given(
    st.sampled_from(["ours", "dlrover", "ray-train"]),
    st.sampled_from([64, 512, 4096]),
    st.integers(0, 8),
    st.floats(0.4, 1.5),
    st.floats(0, 0.5),
    st.integers(1, 1000),
)
def test_the_time_sums_to_one(policy: str, cards: int, spares: int, shape: float, share: float, seed: int) -> None:
    failures = {"preset": "meta-rsc", "weibull_shape": shape, "soft_share": share, "hang_share": share}
    one = situation(policy, cards=cards, spares=spares, days=5, failures=failures, restore_fails=share)

    outcome = simulate(one, replicas=20, seed=seed)

    assert sum(outcome.shares.values()) == pytest.approx(1, abs=1e-9)
    assert all(share >= -1e-12 for share in outcome.shares.values())
    assert outcome.goodput.mean <= outcome.step_time.mean + 1e-9


@law
@given(st.sampled_from(["ours", "dlrover", "ray-train"]), st.integers(1, 4), st.sampled_from([256, 1024]))
def test_doubling_the_spares_never_hurts(policy: str, spares: int, cards: int) -> None:
    few, many = (situation(policy, cards=cards, spares=n) for n in (spares, 2 * spares))

    assert_not_better(found(few), found(many))


def test_goodput_falls_with_the_number_of_cards() -> None:
    outcomes = [found(situation("ray-train", cards=cards, spares=cards // 80)) for cards in (512, 2048, 8192)]

    for larger, smaller in zip(outcomes[1:], outcomes, strict=False):
        assert_not_better(larger, smaller)
        assert larger.mtbf_h == pytest.approx(smaller.mtbf_h / 4)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    one = situation()

    assert found(one) == found(one)
    assert found(one) != simulate(one, replicas=200, seed=4)


def test_infant_mortality_moves_failures_to_the_beginning_and_keeps_their_number() -> None:
    infant = situation("ray-train", cards=4096, days=10, failures={"weibull_shape": 0.7})
    draws, now, nodes = Draws(infant, 1), np.zeros(2000), np.full(2000, 512.0)
    early, total = 0, 0

    while (now := draws.failure_s(now, nodes)).min() < infant.horizon_s:
        early += int((now < infant.horizon_s / 2).sum())
        total += int((now < infant.horizon_s).sum())

    assert total / 2000 == pytest.approx(infant.horizon_s / infant.mtbf_s, rel=0.03)
    assert early / total == pytest.approx(0.5**0.7, abs=0.02)


@pytest.mark.parametrize("policy", ["ours", "dlrover", "ray-train"])
def test_confidence_intervals_narrow_with_replicas(policy: str) -> None:
    one = situation(policy, days=5)

    wide, narrow = found(one, 50), found(one, 800)

    assert narrow.goodput.high - narrow.goodput.low < 0.6 * (wide.goodput.high - wide.goodput.low)
    assert wide.goodput.low <= wide.goodput.mean <= wide.goodput.high

"""The simulator against what can be calculated: Young, Daly, the exact formula, and hand-counted small cases."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tigerbot_jobs.simulate.closed_form import daly, goodput, young
from tigerbot_jobs.simulate.outcome import Outcome, simulate
from tigerbot_jobs.simulate.plain import plain_setting, two_tiers
from tigerbot_jobs.simulate.progress import Progress
from tigerbot_jobs.simulate.setting import Setting, Tiers

HOUR = 3600.0
SEEDS = 512
# M in hours, then d, t and R in seconds: the cases of research/training.md section 6.1, and a grid around them.
PUBLISHED = [(3.09, 60, 1800, 360), (3.09, 10, 600, 360), (49.5, 60, 3600, 1800), (7.9, 300, 10_800, 7200)]
GRID = [(m, d, t, r) for m in (1.0, 7.9, 49.5) for d in (0.05, 10, 120) for t in (60, 900) for r in (5, 600)]


def plain(m: float, d: float, t: float, r: float, **how: bool) -> Setting:
    return plain_setting(mtbf_s=m * HOUR, every_s=t, block_s=d, recovery_s=r, horizon_s=200 * m * HOUR, **how)


def many(setting: Setting, replicas: int = SEEDS) -> Outcome:
    return simulate(setting, replicas=replicas, seed=7)


@pytest.mark.parametrize(("m", "d", "t", "r"), PUBLISHED + GRID)
def test_goodput_agrees_with_the_exact_formula_within_a_fifth_of_a_point(
    m: float, d: float, t: float, r: float
) -> None:
    found = many(plain(m, d, t, r))

    assert found.goodput.mean == pytest.approx(goodput(t, d, m * HOUR, r), abs=0.002)


@pytest.mark.parametrize(("m", "d", "t", "r"), PUBLISHED)
def test_failures_during_recovery_begin_the_recovery_anew(m: float, d: float, t: float, r: float) -> None:
    setting = plain(m, d, t, r, failures_during_recovery=True)

    found = many(setting)

    expected = goodput(t, d, m * HOUR, r, failures_during_recovery=True)
    assert found.goodput.mean == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize(("m", "r", "least"), [(7.9, 300, 0.98), (49.5, 300, 0.989)])
def test_a_memory_tier_counts_like_a_tier_of_its_own_when_every_fault_leaves_it_whole(
    m: float, r: float, least: float
) -> None:
    setting = two_tiers(plain(m, 0, 1800, r), memory_every_s=60, memory_block_s=0.5, storage_every_s=1800)

    found = many(setting)

    assert found.goodput.mean == pytest.approx(goodput(60, 0.5, m * HOUR, r), abs=0.002)
    assert found.goodput.mean > least


@pytest.mark.parametrize(("m", "d"), [(3.09, 10.0), (7.9, 0.5), (49.5, 60.0)])
def test_the_best_interval_of_a_sweep_is_youngs(m: float, d: float) -> None:
    mtbf = m * HOUR
    factors = np.array([0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.4])
    intervals = young(d, mtbf) * factors

    found = np.array([many(plain(m, d, float(t), 60.0), 1024).goodput.mean for t in intervals])

    # Lost time is a/t + b t + c: fitted over the sweep its least is sqrt(a/b), steadier than the best of seven points.
    a, b, _ = np.linalg.lstsq(np.stack([1 / intervals, intervals, np.ones(7)], axis=1), 1 / found, rcond=None)[0]
    assert math.sqrt(a / b) == pytest.approx(daly(d, mtbf) + d, rel=0.1)
    assert found.max() - found[3] < 0.01 * found.max()


def test_dalys_interval_is_youngs_for_short_blocks_and_the_mtbf_for_long_ones() -> None:
    assert daly(0.03, HOUR) == pytest.approx(young(0.03, HOUR), rel=0.01)
    assert daly(3 * HOUR, HOUR) == HOUR


def test_the_pattern_of_snapshots_is_counted_out_by_hand() -> None:
    # Work 10, block 1, work 10, block 1, storage block 3: a period of 25. Storage is valid 4 after its block.
    progress = Progress(Tiers(True, 10.0, 1.0, 2, 3.0, 4.0), 1)
    seen = []

    for upto, before in [(9, 0), (11, 9), (15, 11), (24, 15), (28, 24), (29, 28), (51, 29)]:
        progress.advance(np.array([float(upto - before)]))
        seen.append((progress.total[0, 0], progress.memory[0, 0], progress.storage[0, 0], progress.blocked_s[0]))

    assert seen == [
        (9, 0, 0, 0),
        (10, 10, 0, 1),
        (14, 10, 0, 1),
        (20, 20, 0, 4),
        (23, 20, 0, 5),
        (24, 20, 20, 5),
        (41, 40, 20, 10),
    ]


def test_long_and_short_strides_come_to_the_same() -> None:
    tiers = Tiers(True, 10.0, 1.0, 7, 3.0, 20.0)
    far, near = Progress(tiers, 1), Progress(tiers, 1)

    far.advance(np.array([977.3]))
    for _ in range(9773):
        near.advance(np.array([0.1]))

    for one in ("total", "memory", "storage", "blocked_s"):
        assert getattr(far, one) == pytest.approx(getattr(near, one), abs=1e-6), one


def test_a_failure_before_the_first_snapshot_begins_at_zero() -> None:
    progress = Progress(Tiers(True, 10.0, 1.0, 2, 3.0, 0.0), 2)

    progress.advance(np.array([7.0, 8.0]))
    progress.restore_memory(np.array([0]))
    progress.restore_storage(np.array([1]))

    assert progress.total[0].tolist() == [0, 0] and progress.undone_s.tolist() == [7, 8]


def test_a_write_cut_short_leaves_the_checkpoint_before_it() -> None:
    progress = Progress(Tiers(False, 100.0, 0.0, 1, 0.0, 50.0), 1)

    progress.advance(np.array([220.0]))  # the second checkpoint began at 200 and would be valid at 250
    progress.restore_storage(np.array([0]))

    assert progress.total[0, 0] == 100 and progress.undone_s[0] == 120


def test_without_failures_only_the_blocks_cost() -> None:
    found = many(replace(plain(1.0, 10, 90, 60), node_mtbf_s=math.inf, horizon_s=100_000.0), 4)

    assert found.goodput.mean == pytest.approx(0.9) and found.failures == 0

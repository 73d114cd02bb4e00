"""Small situations counted out: what a spare, a standby, an island, a straggler, a bad restore, a person change."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from tigerbot.spec import PolicySpec, SimulateSpec, parse_spec
from tigerbot_jobs.simulate.engine import Engine
from tigerbot_jobs.simulate.mixes import LLAMA3_CARD_HOURS, MIXES, Cause
from tigerbot_jobs.simulate.outcome import Outcome, simulate
from tigerbot_jobs.simulate.phases import Raw
from tigerbot_jobs.simulate.policies import POLICIES
from tigerbot_jobs.simulate.setting import Setting, setting

DAY = 86_400.0
QUIET = {"planned": {"per_day": 0}, "straggler": {"per_node_day": 0}, "human": {"probability": 0}}


def situation(policy: str = "ours", *causes: Cause, **fields: object) -> Setting:
    raw = {"kind": "simulate", "name": "x", "cards": 256, "spares": 2, "days": 30, **QUIET, **fields}
    spec = parse_spec(raw)
    assert isinstance(spec, SimulateSpec)
    one = setting(spec, PolicySpec.model_validate({"preset": policy}))
    return replace(one, causes=causes) if causes else one


def found(one: Setting, replicas: int = 200) -> Outcome:
    return simulate(one, replicas=replicas, seed=5)


def raw(one: Setting, replicas: int = 200) -> Raw:
    return Engine(one, replicas, 5).run()


def test_the_published_table_adds_up() -> None:
    counts = [cause.count for cause in MIXES["llama3"].causes]

    assert sum(counts) == 419 and len(counts) == 18
    assert round(LLAMA3_CARD_HOURS) == 50_677


def test_a_standby_takes_over_in_fifteen_seconds_and_a_node_is_swapped_in_sixty() -> None:
    ours = POLICIES["ours"]

    assert ours.detect_process_s + ours.takeover_s + ours.memory_restore_s == 15
    assert ours.detect_node_s + ours.swap_warm_s + ours.memory_restore_s == 60


@pytest.mark.parametrize(("kind", "each_s"), [("process", 15.0), ("node", 60.0)])
def test_a_failure_costs_its_recovery_and_half_an_interval(kind: str, each_s: float) -> None:
    one = situation("ours", Cause("only", 1, kind=kind, repair="reboot"), failures={"spares_fail": 0})  # type: ignore[arg-type]
    one = replace(one, spares=50, standbys=50)

    outcome = raw(one, 400)

    failures = outcome.failures.sum()
    recovery = sum(outcome.seconds[part].sum() for part in ("hang_wait", "idle_after_failure", "restore"))
    assert recovery / failures == pytest.approx(each_s, rel=0.03)
    assert outcome.seconds["recompute"].sum() / failures == pytest.approx(5.0, rel=0.05)


def test_without_a_memory_copy_a_fault_costs_half_the_storage_interval() -> None:
    one = situation("ours", Cause("rack", 1, kind="island", repair="reboot"))
    one = replace(one, spares=50, standbys=50)

    outcome = raw(one, 400)

    # The checkpoint of 240 s ago counts only once it is written: 120 s later.
    lost_s = outcome.seconds["recompute"].sum() / outcome.failures.sum()
    assert lost_s == pytest.approx(240 / 2 + 120, rel=0.05)


def test_without_spares_a_fixed_world_waits_for_the_repair_and_an_elastic_one_goes_on() -> None:
    broken = Cause("gpu", 1)
    fixed, elastic = situation("ray-train", broken, spares=0), situation("ours", broken, spares=0)

    waiting, going_on = found(fixed), found(elastic)

    assert waiting.waits > 1 and waiting.shares["idle_after_failure"] > 0.1
    assert going_on.waits == 0 and going_on.step_time.mean > 0.98
    assert going_on.goodput.mean < going_on.step_time.mean - 0.01  # fewer nodes count as loss


def test_an_elastic_world_waits_at_its_least_size() -> None:
    one = situation("ours", Cause("gpu", 1), spares=0, min_cards=256)

    assert found(one).waits > 1


def test_the_speed_of_a_smaller_world_follows_the_given_curve() -> None:
    broken = Cause("gpu", 1)
    linear = situation("ours", broken, spares=0)
    flat = replace(linear, speeds=((1.0, 1.0), (32.0, 1.0)))

    assert found(flat).goodput.mean == pytest.approx(found(flat).step_time.mean)
    assert found(linear).goodput.mean < found(flat).goodput.mean


def test_a_world_in_steps_leaves_nodes_unused() -> None:
    broken = Cause("gpu", 1)

    single, by_four = (situation("ours", broken, spares=0, size_step_nodes=step) for step in (1, 4))

    assert found(by_four).goodput.mean < found(single).goodput.mean


def test_spares_fail_too() -> None:
    one = situation("ours", Cause("gpu", 1), spares=3, failures={"preset": "meta-rsc"})
    sound = replace(one, spares_fail=0.0)

    assert found(one).goodput.mean < found(sound).goodput.mean


def test_a_second_fault_in_a_recovery_begins_it_anew_and_may_take_the_copy() -> None:
    one = situation("ours", Cause("gpu", 1, repair="reboot"), cards=64, days=2, failures={"mtbf_card_hours": 40.0})
    one = replace(one, spares=60, standbys=60, policy=replace(one.policy, swap_warm_s=600.0))

    calm = found(replace(one, failures_during_recovery=False))
    rough = found(one)

    assert rough.goodput.mean < calm.goodput.mean - 0.01
    assert rough.failures > 1 and rough.shares["restore"] > 0


def test_a_restore_that_fails_falls_back_a_tier() -> None:
    sound = situation("ours", Cause("bug", 1, kind="process"), failures={"preset": "meta-rsc"})
    brittle = replace(sound, restore_fails=0.5)

    for part in ("restore", "recompute"):
        assert found(brittle).shares[part] > 2 * found(sound).shares[part]


def test_people_who_are_needed_are_waited_for() -> None:
    one = situation("ours", Cause("bug", 1, kind="process"))
    called = replace(one, human_probability=1.0, human=(7200.0, 0.0))

    outcome = raw(called)

    each_s = outcome.seconds["idle_after_failure"].sum() / outcome.failures.sum()
    assert each_s == pytest.approx(7200 + called.policy.takeover_s, rel=0.03)


def test_planned_interruptions_lose_nothing_but_their_time() -> None:
    one = replace(situation(), node_mtbf_s=math.inf, planned_every_s=DAY, planned_pause_s=600.0)

    outcome = raw(one)

    assert outcome.seconds["recompute"].sum() == 0
    assert outcome.seconds["other"].mean() == pytest.approx(30 * 600, rel=0.05)


def test_a_straggler_slows_all_until_it_is_noticed_and_swapped() -> None:
    one = replace(situation(), node_mtbf_s=math.inf, straggler_every_s=2 * DAY, straggler_speed=0.5)
    blind = replace(one, policy=replace(one.policy, straggler_notice_s=DAY))

    quick, slow = found(one), found(blind)

    assert quick.goodput.mean > quick.step_time.mean - 0.005
    assert slow.goodput.mean == pytest.approx(slow.step_time.mean - 0.5 / 3, abs=0.02)


def test_hangs_cost_their_deadline() -> None:
    bug = Cause("bug", 1, kind="process")
    one = situation("ray-train", bug)

    crashed, hung = found(one), found(replace(one, hang_share=1.0))

    assert hung.failures_by_kind["hang"] == pytest.approx(hung.failures)
    assert hung.shares["hang_wait"] > 100 * crashed.shares["hang_wait"]


def test_an_intervals_default_is_youngs() -> None:
    one = situation("ray-train")

    assert one.tiers.storage_every_s == pytest.approx(np.sqrt(2 * 10 * one.mtbf_s))


def test_what_a_restart_of_the_processes_cures_leaves_the_nodes_memory() -> None:
    hard = situation("dlrover", Cause("gpu", 1), spares=30)

    broken, soft = found(hard), found(replace(hard, soft_share=1.0))

    assert soft.failures_by_kind["process"] == pytest.approx(soft.failures)
    assert soft.shares["recompute"] < 0.5 * broken.shares["recompute"]

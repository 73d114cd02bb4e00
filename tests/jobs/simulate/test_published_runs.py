"""Published runs, the targets, prediction of a small chaos run, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tigerbot.errors import InputError, SpecError
from tigerbot.spec import load_spec, parse_spec
from tigerbot_jobs.simulate.predict import LedgerSummary, MeasuredFault, predict
from tigerbot_jobs.simulate.published import glm, llama3, targets
from tigerbot_jobs.simulate.setting import settings

ROOT = Path(__file__).parents[3]
REPLICAS = 60


def test_llama3s_practice_gives_more_than_ninety_percent_and_checkpoints_that_block_a_minute_do_not() -> None:
    quick, slow = llama3(REPLICAS)

    assert quick.outcome.goodput.low > 0.90
    assert slow.outcome.goodput.high < 0.90
    # 419 unexpected interruptions in 54 days, and some more while recovering or of nodes that wait.
    assert quick.outcome.failures == pytest.approx(419, rel=0.03)


def test_what_dlrover_gained_by_flash_checkpoints_lies_between_the_two_published_failure_rates() -> None:
    # The blog says 90% -> 95% and names no failure rate: nothing of it but the checkpoints goes in.
    gains = {
        preset: glm(preset, 0.75, True, REPLICAS).goodput.mean - glm(preset, 0.75, False, REPLICAS).goodput.mean
        for preset in ("llama3", "meta-rsc")
    }

    assert gains["llama3"] < 0.05 < gains["meta-rsc"]
    assert gains["llama3"] == pytest.approx(0.05, abs=0.02)


def test_the_targets_are_reached_with_the_defaults() -> None:
    for target in targets(REPLICAS):
        if target.wanted is not None:
            assert target.outcome.goodput.mean >= target.wanted, target.cards


def summary(*faults: MeasuredFault, snapshot: int = 1) -> LedgerSummary:
    return LedgerSummary(
        wall_s=900,
        start_s=20,
        step_s=0.2,
        snapshot_every_steps=snapshot,
        snapshot_block_s=0.005,
        checkpoint_every_s=30,
        checkpoint_block_s=0.0,
        checkpoint_write_s=1.0,
        faults=faults,
        other_s_per_step=0.01,
    )


def test_a_chaos_run_without_faults_is_predicted_by_division() -> None:
    found = predict(summary())

    assert found.goodput.mean == pytest.approx((880 / 900) * 0.2 / 0.215, abs=0.002)
    assert sum(found.shares.values()) == pytest.approx(1)


def test_a_chaos_run_is_predicted_by_what_each_fault_costs() -> None:
    kill = MeasuredFault("process", per_hour=60, detect_s=0.3, recover_s=1.2)
    lost = MeasuredFault("node", per_hour=20, detect_s=5.0, recover_s=3.0, from_memory=False)

    found = predict(summary(kill, lost))

    # Each costs detection and recovery without the step in them; a lost node half a storage interval and its write too.
    each_s = 60 / 3600 * (0.3 + 1.2 - 0.21) + 20 / 3600 * (5.0 + 3.0 - 0.3 + 15 + 1)
    assert found.goodput.mean == pytest.approx((880 / 900) * 0.2 / 0.215 / (1 + each_s), abs=0.02)
    assert found.goodput.run_low < found.goodput.mean < found.goodput.run_high


def test_a_fault_that_has_no_memory_to_go_back_to_costs_more() -> None:
    kill = MeasuredFault("process", per_hour=60, detect_s=0.3, recover_s=1.2)

    assert predict(summary(kill, snapshot=0)).goodput.mean < predict(summary(kill)).goodput.mean - 0.05


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("policies.0.takeover_s=-1", "policies.0.takeover_s: got -1, wants greater than or equal to 0"),
        ("days=0", "days: got 0"),
        ("days=.inf", "days"),
        ("cards=1023", "cards wants a multiple of cards_per_node (8); got 1023"),
        ("min_cards=4096", "min_cards wants at most cards (1024); got 4096"),
        ("failures.preset=llama4", "did you mean llama3?"),
        ("policies.0.takover_s=1", "did you mean takeover_s?"),
        ("restore_fails=1", "restore_fails: got 1"),
        ("failures.causes=[]", "failures.causes"),
    ],
)
def test_a_wrong_simulation_is_one_line(override: str, said: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_spec(ROOT / "jobs/simulate.yaml", [override])

    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"storage_every_s": 5}, "shorter than writing takes"),
        ({"memory_every_s": 500, "storage_every_s": 300}, "longer than storage_every_s"),
    ],
)
def test_intervals_that_contradict_each_other_are_refused(policy: dict, said: str) -> None:
    spec = parse_spec({"kind": "simulate", "name": "x", "cards": 64, "policies": [policy]})

    with pytest.raises(InputError, match=said):
        settings(spec)  # type: ignore[arg-type]


def test_the_command_prints_a_table_keeps_the_result_and_shows_it_again(tmp_path: Path) -> None:
    spec = tmp_path / "small.yaml"
    spec.write_text(
        "kind: simulate\nname: small\ncards: 64\ndays: 10\nreplicas: 20\nbuy: {cards: [64], standbys: [0]}\n"
    )
    command = [sys.executable, "-m", "tigerbot.cli", "simulate", str(spec)]

    first, second = (
        subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path) for _ in range(2)
    )

    assert first.returncode == second.returncode == 0, first.stderr
    for shown in ("ours", "dlrover", "ray-train", "What to buy at 64 cards", "Least cost"):
        assert shown in first.stdout and shown in second.stdout
    assert "done already" in second.stdout
    kept = json.loads((tmp_path / "tiger-runs/small/simulation.json").read_text())
    assert [policy["name"] for policy in kept["policies"]] == ["ours", "dlrover", "ray-train"]


def test_the_command_refuses_a_spec_of_another_kind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tigerbot.cli", "simulate", str(ROOT / "jobs/eval.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )

    assert done.returncode == 2 and "kind eval" in done.stderr and len(done.stderr.strip().splitlines()) == 1

"""Stories of runs, and where their seconds must be found."""

from __future__ import annotations

from pathlib import Path

import pytest
from ledger_story import Story

from tigerbot_jobs.train.goodput import Account, LiveAccount, account, as_metrics, percentile
from tigerbot_jobs.train.ledger import read_events
from tigerbot_jobs.train.measured import Faults, measured


def spent(found: Account) -> dict[str, float]:
    """Categories with time in them, having checked that nothing is missing."""
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
    return {name: round(seconds, 6) for name, seconds in found.seconds.items() if seconds > 1e-6}


def test_an_undisturbed_run_is_its_steps_and_what_came_before_them(tmp_path: Path) -> None:
    story = Story(tmp_path).ready()
    story.steps(86, data=0.1).steps(1, checkpoint=0.4, evaluation=0.3).wait(1).write("stopped", reason="done")

    found = story.account()

    assert spent(found) == {
        "queue": 4,
        "start": 8,
        "step": 77.7,
        "data_wait": 8.6,
        "checkpoint_block": 0.4,
        "eval": 0.3,
        "other": 1,
    }
    assert found.wall_s == 100 and found.goodput == pytest.approx(0.777)
    assert (found.steps, found.tokens, found.ended, found.losses) == (87, 8700, "done", ())


def test_a_dead_worker_costs_from_the_last_step_to_the_first_new_one(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(10).wait(0.6).fault("process", evidence="exit status -9")
    story.wait(0.1).decide("replace").group("fault").steps(10)

    found = story.account()

    assert spent(found) == {
        "queue": 4,
        "start": 8,
        "step": 20,
        "hang_wait": 0.6,
        "idle_after_failure": 0.6,
        "restore": 0.25,
    }
    (loss,) = found.losses
    assert loss.incident.kind == "process" and loss.incident.tier == "memory"
    assert loss.incident.mttd_s == pytest.approx(0.6) and loss.incident.mttr_s == pytest.approx(1.85)
    assert loss.total_s == pytest.approx(1.45) and found.undone_steps == 0


def test_steps_since_the_snapshot_that_was_restored_are_recompute(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(10, data=0.25).wait(1).fault("node").decide("replace")
    story.step = 7
    story.group("fault", tier="storage").steps(13)

    found = story.account()

    assert found.seconds["recompute"] == pytest.approx(3) and found.seconds["data_wait"] == pytest.approx(7 * 0.25)
    assert (found.steps, found.undone_steps, found.tokens) == (20, 3, 2000)
    (loss,) = found.losses
    assert len(loss.incident.undone) == 3 and loss.seconds["recompute"] == pytest.approx(3)


def test_going_on_with_fewer_and_growing_again_is_resize(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(5).wait(0.5).fault("node").decide("shrink")
    story.group("fault", size=1).steps(5, each=2.0).wait(0.2).decide("grow").group("grow", size=2).steps(5)

    found = story.account()

    assert found.seconds["resize"] == pytest.approx(0.5 + 0.2 + 0.5) and found.seconds["restore"] == 0.5
    assert found.seconds["idle_after_failure"] == 0
    (growth,) = found.resizes
    assert len(found.losses) == 1 and growth.total_s == pytest.approx(0.2 + 0.5 + 0.25)
    assert found.goodput_throughput == pytest.approx(1500 / (100 * found.wall_s), rel=0.4)


def test_a_driver_that_was_killed_is_an_incident_of_its_successor(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(10)
    story.wait(30)
    story.step = 8
    story.ready(tier="memory").steps(2)

    found = story.account()

    assert found.lives == 2 and found.seconds["idle_after_failure"] == 30
    assert found.seconds["recompute"] == 2 and found.seconds["queue"] == 8
    (loss,) = found.losses
    assert loss.incident.kind == "driver" and loss.incident.mttd_s is None
    assert loss.incident.mttr_s == pytest.approx(30 + 12 + 1)
    assert loss.seconds["idle_after_failure"] == 30 and loss.seconds["restore"] == 2


def test_a_fault_during_recovery_belongs_to_the_incident_that_is_open(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(10).wait(1).fault("hang").decide("kill").group("fault")
    story.wait(2).fault("process", rank=0).decide("replace").group("fault").steps(5)

    found = story.account()

    (loss,) = found.losses
    assert loss.incident.kind == "hang+process" and loss.incident.actions == ["kill", "replace"]
    assert loss.incident.mttr_s == pytest.approx(0.75 + 2 + 0.75 + 1)
    assert loss.seconds["hang_wait"] == pytest.approx(3)


def test_a_loss_spike_rolls_back_past_steps_that_had_been_kept(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(20, snapshot=0.1).fault("spike", evidence="loss 9.1 against 3.2")
    story.decide("rollback").write("rollback", from_step=20, to_step=15, skip=[16, 20])
    story.step = 15
    story.group("rollback").steps(5)

    found = story.account()

    (loss,) = found.losses
    assert loss.incident.kind == "spike" and len(loss.incident.undone) == 5
    assert loss.incident.mttd_s is None and loss.incident.mttr_s == pytest.approx(0.75 + 1)
    assert found.seconds["recompute"] == pytest.approx(5) and found.steps == 20


def test_a_skipped_step_and_a_marked_straggler_are_noted_and_cost_nothing(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(5).fault("nan").decide("skip").steps(5).fault("straggler").decide("wait")
    story.steps(5)

    found = story.account()

    assert [loss.incident.kind for loss in found.losses] == ["nan", "straggler"]
    assert all(loss.total_s == 0 and loss.incident.mttr_s is None for loss in found.losses)
    assert found.seconds["step"] == 15


def test_a_straggler_is_down_only_while_it_is_being_replaced(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(5).fault("straggler").steps(30).decide("replace").steps(2)
    story.wait(0.25).group("straggler").steps(5)

    found = story.account()

    (loss,) = found.losses
    assert loss.incident.actions == ["replace"] and loss.total_s == pytest.approx(1.0)
    assert found.seconds["step"] == 42


def test_a_link_that_comes_back_by_itself_is_a_long_step_with_a_wait_in_it(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(10).wait(4).fault("partition").decide("wait").wait(2)
    story.write("steps", generation=1, world_size=2, rows=[[11, 6.0, 0, 0, 0, 0, 100]])
    story.step = 11
    story.steps(10)

    found = story.account()

    assert found.seconds["hang_wait"] == pytest.approx(5) and found.seconds["step"] == pytest.approx(21)
    (loss,) = found.losses
    assert loss.incident.mttr_s == pytest.approx(2) and found.steps == 21


def test_the_death_of_a_standby_stops_nobody(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(10).fault("process", rank=-1).decide("replace").steps(10)

    found = story.account()

    assert found.seconds["step"] == 20 and found.losses[0].total_s == 0


def test_steps_reported_after_the_fault_was_seen_lie_before_it(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(10).wait(1.3).fault("process", rank=1)
    row = [11, 1.0, 0, 0, 0, 0, 100]
    story.wait(0.1).write("steps", generation=1, world_size=2, rows=[row])
    story.step = 11
    story.decide("replace").group("fault").steps(5)

    found = story.account()

    assert found.steps == 16 and found.undone_steps == 0
    (loss,) = found.losses
    assert loss.incident.mttd_s == pytest.approx(0.3) and loss.incident.mttr_s == pytest.approx(0.1 + 0.75 + 1)


def test_a_wall_clock_that_jumps_changes_no_duration(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(10)
    story.wall -= 5000
    story.steps(10).wait(1).write("stopped", reason="done")

    found = story.account()

    assert found.wall_s == pytest.approx(33) and found.seconds["step"] == 20


def test_time_after_a_stop_is_idle_but_not_paid_and_time_after_the_end_is_nobodys(tmp_path: Path) -> None:
    story = Story(tmp_path, workers=2, standbys=2, price=2.0).ready().steps(24).write("stopped", reason="killed")
    story.wait(3600).ready(tier="storage").steps(24).write("stopped", reason="done")
    story.wait(86400).ready(tier="storage").steps(24).write("stopped", reason="done")

    found = story.account()

    assert found.wall_s == pytest.approx(3 * 36 + 3600) and found.stopped_s == 3600
    assert found.card_hours == pytest.approx(4 * 3 * 36 / 3600)
    assert found.cost == pytest.approx(found.card_hours * 2)


def test_a_living_run_is_counted_up_to_now_and_a_dead_one_up_to_its_last_word(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(10)

    living, dead = story.account(until=story.wall + 5), story.account()

    assert living.wall_s - dead.wall_s == pytest.approx(5) and living.seconds["other"] == pytest.approx(5)
    assert living.ended == dead.ended == ""


def test_a_ledger_that_is_followed_says_at_any_time_what_the_whole_one_would(tmp_path: Path) -> None:
    story = Story(tmp_path).driver()
    live, accounts = LiveAccount(story.path), []

    def compare() -> None:
        accounts.append((live.now(), account(read_events(story.path))))

    compare()
    story.ready().steps(10).wait(2).fault("process")
    compare()
    story.decide("replace").wait(1).group("fault")
    compare()
    story.steps(5).write("persisted", step=15, seconds=1.0, size_bytes=7)
    compare()

    assert [followed.seconds for followed, _ in accounts] == [whole.seconds for _, whole in accounts]
    assert [followed.mttr_s for followed, _ in accounts] == [whole.mttr_s for _, whole in accounts]
    assert accounts[-1][0].persisted_bytes == 7 and accounts[-1][0].wall_s > 18
    story.close()


def test_a_driver_that_was_replaced_and_does_not_know_it_is_not_listened_to(tmp_path: Path) -> None:
    story = Story(tmp_path).ready().steps(3)
    old = [line for line in story.path.read_text().splitlines() if '"steps"' in line]
    story.wait(10).ready(tier="memory").steps(3)
    story.close()
    with story.path.open("a") as file:
        file.write("\n".join(old) + "\n")

    found = story.account()

    assert found.steps == 6 and found.lives == 2


def test_an_empty_ledger_is_an_empty_account(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.path.write_text("")

    found = story.account()

    assert found.wall_s == found.goodput == found.goodput_throughput == 0 and found.cost is None
    assert as_metrics(found)["goodput"] == 0 and measured(found).mttr_s == 0


def test_metrics_and_the_simulators_input_say_the_same_as_the_account(tmp_path: Path) -> None:
    story = Story(tmp_path).ready()
    for _ in range(3):
        story.steps(9).steps(1, each=1.2, snapshot=0.2).wait(0.5).fault("process").decide("replace").group("fault")
    story.steps(10).write("persisted", step=30, seconds=2.0, size_bytes=5000).write("stopped", reason="done")

    found = story.account()
    metrics, inputs = as_metrics(found), measured(found)

    assert metrics["goodput"] == found.goodput and metrics["lost_s_hang_wait"] == pytest.approx(1.5)
    assert metrics["mttr_p50_s"] == pytest.approx(1.75) and metrics["persisted_bytes"] == 5000
    assert metrics["cost"] == pytest.approx(found.wall_s * 3 / 3600 * 3)
    assert sum(v for k, v in metrics.items() if k.startswith("lost_s_")) + metrics["useful_step_s"] == pytest.approx(
        found.wall_s
    )
    assert (inputs.mttr_s, inputs.mttd_s) == (pytest.approx(1.75), pytest.approx(0.5))
    assert (inputs.step_s, inputs.snapshot_block_s, inputs.snapshot_every_steps) == (1.0, 0.2, 10)
    assert inputs.workers == 2 and inputs.start_s == 12
    per_hour = pytest.approx(3 * 3600 / found.wall_s)
    assert inputs.faults == (
        Faults("process", per_hour, *[pytest.approx(x) for x in (0.5, 1.75, 0)], from_memory=True),
    )


def test_percentiles_lie_between_the_values_they_fall_between() -> None:
    values = [4.0, 1.0, 3.0, 2.0]

    found = [percentile(values, q) for q in (0, 50, 100)]

    assert found == [1.0, 2.5, 4.0]

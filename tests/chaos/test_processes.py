"""A training run whose processes are killed, stopped, and go wrong in every way a process can: it ends as if nothing was."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clocks import WallClock
from stories import INTERVAL, STEPS, Corpus, Ending, Story, make_corpus, pid_of

from tigerbot.tracking import serve_tracking


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One MLflow server for all stories: each would start its own for seconds."""
    server = serve_tracking(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
    yield server.url
    server.stop()


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, tracking: str, tmp_path_factory: pytest.TempPathFactory) -> Ending:
    with Story(corpus, tmp_path_factory.mktemp("undisturbed"), tracking) as story:
        assert story.wait() == 0
        story.check_books()
        story.check_nothing_is_left()
        return story.ending()


def check_end(story: Story, undisturbed: Ending) -> None:
    """As if nothing had been."""
    assert story.wait() == 0
    story.check_books()
    story.check_nothing_is_left()
    assert story.ending() == undisturbed


def kill_at_random(story: Story, *pids: int) -> None:
    """At any point of a step."""
    time.sleep(random.uniform(0, 0.3))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_a_killed_worker_hands_its_rank_to_the_standby_and_the_survivor_stays(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path
) -> None:
    with Story(corpus, tmp_path, tracking, scale={"standbys": 1}) as story:
        story.wait_for_workers(3)
        story.wait_for_step(random.randint(4, 30))
        rank, before, spares = random.randrange(2), story.members(), story.spares()

        kill_at_random(story, pid_of(before[rank]))
        story.wait_for_generation(2)
        after = story.members()

        check_end(story, undisturbed)
        assert after[1 - rank] == before[1 - rank] and after[rank] in spares
        assert story.faults() == ["process"]
        assert max(story.steps_lost()) <= INTERVAL


def test_without_a_standby_one_trains_on_and_the_replacement_joins_when_it_is_ready(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path
) -> None:
    slow_alone = {"do": "wait", "world_size": 1, "seconds": 0.4}
    with Story(corpus, tmp_path, tracking, scale={"workers": [1, 2]}, inject=[slow_alone]) as story:
        story.wait_for_step(4)

        kill_at_random(story, pid_of(random.choice(story.members())))

        assert story.wait() == 0
        story.check_books()
        story.check_nothing_is_left()
        assert [event.whole("world_size") for event in story.generations()] == [2, 1, 2]
        assert max(story.steps_lost()) <= INTERVAL
        ending = story.ending()
        assert ending.used == undisturbed.used
        assert ending.loss == pytest.approx(undisturbed.loss, rel=1e-3)


def test_a_stopped_worker_is_named_and_replaced(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path
) -> None:
    with Story(corpus, tmp_path, tracking, scale={"standbys": 1}) as story:
        story.wait_for_workers(3)
        story.wait_for_step(random.randint(10, 30))
        victim = random.choice(story.members())
        time.sleep(random.uniform(0, 0.3))

        stopped_at = time.time()
        os.kill(pid_of(victim), signal.SIGSTOP)

        check_end(story, undisturbed)
        (fault,) = story.events("fault_seen")
        rows = [row for event in story.events("steps") if event.t < stopped_at for row in event.items("rows")]
        slowest = sorted(row[1] for row in rows)[-1]
        assert (fault.text("fault"), fault.text("worker")) == ("hang", victim)
        assert fault.t - stopped_at <= 3 * slowest + 5 + 1
        assert "frozen" in fault.text("evidence")


@pytest.mark.soak
def test_when_all_workers_are_killed_at_once_new_ones_go_on_from_shared_memory(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path
) -> None:
    with Story(corpus, tmp_path, tracking) as story:
        story.wait_for_step(random.randint(4, 40))

        kill_at_random(story, *map(pid_of, story.members()))

        check_end(story, undisturbed)
        assert [event.text("tier") for event in story.events("restored")] == ["none", "memory"]
        assert max(story.steps_lost()) <= INTERVAL


@pytest.mark.soak
def test_the_standby_that_just_stepped_in_is_killed_too(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path
) -> None:
    with Story(corpus, tmp_path, tracking, scale={"standbys": 1}) as story:
        story.wait_for_workers(3)
        story.wait_for_step(random.randint(4, 40))
        before = story.members()

        kill_at_random(story, pid_of(before[0]))
        story.wait_for_generation(2)
        (newcomer,) = set(story.members()) - set(before)
        os.kill(pid_of(newcomer), signal.SIGKILL)

        check_end(story, undisturbed)
        assert sum(story.steps_lost()) <= INTERVAL


def test_a_step_whose_loss_is_no_number_is_left_out(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path
) -> None:
    nan = {"do": "nan", "rank": 1, "steps": [20, 20]}
    with Story(corpus, tmp_path, tracking, inject=[nan]) as story:
        assert story.wait() == 0
        story.check_books(missing=[21])
        story.check_nothing_is_left()
        (fault,) = story.events("fault_seen")
        assert (fault.text("fault"), fault.whole("step")) == ("nan", 20)
        assert [event.text("action") for event in story.events("decision")] == ["skip"]
        assert len(story.generations()) == 1
        assert story.ending().loss == pytest.approx(undisturbed.loss, rel=0.1)


def test_a_bug_that_comes_back_ends_the_run_with_one_line(corpus: Corpus, tracking: str, tmp_path: Path) -> None:
    with Story(corpus, tmp_path, tracking, inject=[{"do": "bug", "steps": [7, 7]}]) as story:
        assert story.wait() == 1
        last = story.driver.output().strip().splitlines()[-1]
        assert "it is a bug" in last and "ValueError: injected" in last and "step 7" in last
        assert "Traceback" not in story.driver.output()
        assert story.faults() == ["exception", "exception"]
        assert [event.text("reason") for event in story.events("stopped")] == ["failed"]


@pytest.mark.soak
def test_a_rank_whose_weights_lose_a_bit_is_named_and_replaced_and_its_steps_are_taken_back(
    corpus: Corpus, tracking: str, tmp_path: Path
) -> None:
    flip = {"do": "flip", "rank": 1, "steps": [24, 24], "once": True}
    three = {"workers": 3, "standbys": 1}
    with Story(corpus, tmp_path, tracking, scale=three, inject=[flip], deepspeed={"zero_stage": 0}) as story:
        story.wait_for_generation(1)
        victim = story.members()[1]

        assert story.wait() == 0

        story.check_books()
        story.check_nothing_is_left()
        (fault,) = story.events("fault_seen")
        assert (fault.text("fault"), fault.whole("rank"), fault.whole("step")) == ("corruption", 1, 30)
        assert "rank 1 of 3 holds other bits than the 2 that agree" in fault.text("evidence")
        assert victim not in story.members() and len(story.members()) == 3
        assert [event.whole("step") for event in story.events("restored")][-1] == 20


@pytest.mark.soak
def test_an_exception_that_does_not_come_back_costs_nothing(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path
) -> None:
    bug = {"do": "bug", "rank": 1, "steps": [random.randint(3, 50), STEPS], "once": True}
    with Story(corpus, tmp_path, tracking, inject=[bug]) as story:
        check_end(story, undisturbed)
        assert story.faults() == ["exception"]
        assert len({event.text("worker") for event in story.events("worker_ready")}) == 2


@pytest.mark.soak
def test_a_worker_that_sleeps_in_a_step_is_named_and_replaced(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path
) -> None:
    sleep = {"do": "sleep", "rank": 1, "steps": [30, 30], "once": True}
    with Story(corpus, tmp_path, tracking, scale={"standbys": 1}, inject=[sleep]) as story:
        story.wait_for_workers(3)
        asleep = story.members()[1]

        check_end(story, undisturbed)
        (fault,) = story.events("fault_seen")
        assert (fault.text("fault"), fault.text("worker")) == ("hang", asleep)
        assert "in <lambda>" in "".join(event.text("stacks") for event in story.events("stacks"))


@pytest.mark.soak
def test_a_loss_that_runs_away_is_taken_back_and_its_batches_are_never_taken_again(
    corpus: Corpus, tracking: str, tmp_path: Path
) -> None:
    spike = {"do": "spike", "batches": [110, 112]}
    tolerance = {"checkpoint_every_steps": 10}
    with Story(corpus, tmp_path, tracking, inject=[spike], tolerance=tolerance, keep=20, tokens=140 * 1024) as story:
        assert story.wait() == 0
        story.check_books()
        story.check_nothing_is_left()
        (back,) = story.events("rollback")
        first, last = back.items("skip")
        assert first <= 110 and last == 112 and back.whole("to_step") <= 11
        assert "rollback" in [event.text("action") for event in story.events("decision")]
        assert len(story.used()) == story.steps


@pytest.mark.soak
def test_after_a_killed_driver_the_same_command_goes_on_from_shared_memory(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path
) -> None:
    with Story(corpus, tmp_path, tracking) as story:
        story.wait_for_step(random.randint(4, 40))
        time.sleep(random.uniform(0, 0.3))
        story.driver.kill()
        furthest = story.furthest()
        story.driver.wait(10)

        story.start()

        assert story.wait() == 0
        story.check_books()
        # Ray's agents look for their raylet for a minute before they give up.
        story.check_nothing_is_left(patience_s=90)
        assert story.ending() == undisturbed
        restored = story.events("restored")[-1]
        assert restored.text("tier") == "memory" and restored.whole("step") >= furthest - INTERVAL


@pytest.mark.soak
def test_a_notice_that_the_machine_goes_puts_the_state_into_storage_in_time(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notice = tmp_path / "preempted"
    monkeypatch.setenv("TIGER_PREEMPTION_FILE", str(notice))
    with Story(corpus, tmp_path, tracking, tolerance={"checkpoint_every_steps": None}) as story:
        story.wait_for_step(random.randint(10, 40))
        noticed_at = time.time()
        notice.write_text("10")

        check_end(story, undisturbed)
        assert story.faults() == ["preemption"]
        assert [event.text("action") for event in story.events("decision")] == ["persist"]
        assert any(noticed_at < event.t < noticed_at + 10 for event in story.events("persisted"))


@pytest.mark.soak
def test_a_worker_that_is_told_to_end_hands_its_rank_over_before_it_is_killed(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path
) -> None:
    with Story(corpus, tmp_path, tracking, scale={"standbys": 1}, tolerance={"checkpoint_every_steps": None}) as story:
        story.wait_for_workers(3)
        story.wait_for_step(random.randint(4, 30))
        told = pid_of(story.members()[random.randrange(2)])
        os.kill(told, signal.SIGTERM)
        told_at = time.time()
        story.wait_for_generation(2)
        os.kill(told, signal.SIGKILL)

        check_end(story, undisturbed)
        assert story.faults() == ["preemption"]
        assert [event.text("reason") for event in story.generations()] == ["start", "preemption"]
        assert any(told_at < event.t < told_at + 10 for event in story.events("persisted"))


@pytest.mark.soak
def test_a_wall_clock_that_jumps_forth_and_back_is_no_fault(
    corpus: Corpus, tracking: str, undisturbed: Ending, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = WallClock(tmp_path)
    for name, value in clock.environment().items():
        monkeypatch.setenv(name, value)
    with Story(corpus, tmp_path / "run", tracking) as story:
        story.wait_for_step(10)
        clock.jump_to(3600)
        story.wait_for_step(25)
        clock.jump_to(-3600)

        check_end(story, undisturbed)
        assert story.faults() == []
        assert len(story.generations()) == 1

"""Nodes die, links break, heads are lost: the run goes on with who is left, from a peer's memory, and grows back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Network
from nodes import HealthCheck, RayCluster
from stories import Corpus, Ending, Story, injecting

pytestmark = [pytest.mark.root, pytest.mark.soak]
# Ray takes a silent node for dead after about 10 s; the hub's watch is to be the first to know.
PATIENT = HealthCheck(period_ms=500, timeout_ms=2500, failures=4)
# Alone a worker is slow, so that the run is still there when a node comes back; it starts in half a minute.
SLOW_ALONE = {"do": "wait", "world_size": 1, "seconds": 1.5}


@pytest.fixture(scope="module")
def machines(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A head without room for a worker, and two nodes with room for one each."""
    with RayCluster(
        workers=2,
        cpus=1,
        head_cpus=0,
        network=network,
        health_check=PATIENT,
        # A worker is not to starve on a machine that has other things to do.
        environment_of_nodes={"RAY_worker_niceness": "0"} | injecting(tmp_path_factory.mktemp("story") / "now"),
    ) as started:
        started.wait_alive({"head", "node1", "node2"}, 60)
        yield started


@pytest.fixture(scope="module")
def undisturbed(corpus: Corpus, machines: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Ending:
    with on(machines, corpus, tmp_path_factory.mktemp("undisturbed")) as story:
        assert story.wait() == 0
        story.check_books()
        story.check_nothing_is_left()
        return story.ending()


def on(machines: RayCluster, corpus: Corpus, folder: Path, **about: object) -> Story:
    """A run of one or two workers on these machines; MLflow is a file, which the driver serves to itself."""
    scale = {"workers": [1, 2], "cpus_per_worker": 1}
    tracking = f"sqlite:///{folder}/mlflow.db"
    return Story(corpus, folder, tracking, cluster=machines, scale=scale, inject=[SLOW_ALONE], **about)  # type: ignore[arg-type]


def check_end(story: Story, undisturbed: Ending) -> None:
    """The same samples in the same steps; sums over other world sizes differ in the last bits."""
    assert story.wait() == 0
    story.check_books()
    story.check_nothing_is_left()
    ending = story.ending()
    assert ending.used == undisturbed.used
    assert ending.loss == pytest.approx(undisturbed.loss, rel=1e-3)


def sizes(story: Story) -> list[int]:
    return [event.whole("world_size") for event in story.generations()]


def test_a_lost_node_is_replaced_by_the_copy_of_its_state_and_a_new_node_lets_the_run_grow_back(
    machines: RayCluster, corpus: Corpus, undisturbed: Ending, tmp_path: Path
) -> None:
    with on(machines, corpus, tmp_path) as story:
        story.wait_for_step(10)
        story.wait_for_copies(2)
        machines.kill_node("node1")
        story.wait_for_generation(2)
        machines.add_node("node1")

        check_end(story, undisturbed)
        assert sizes(story) == [2, 1, 2]
        assert story.faults() == ["node"]
        assert {event.text("tier") for event in story.events("restored")[1:]} == {"memory"}
        assert max(story.steps_lost()) <= 2


def test_a_raylet_that_is_killed_takes_its_worker_with_it_and_nothing_else(
    machines: RayCluster, corpus: Corpus, undisturbed: Ending, tmp_path: Path
) -> None:
    with on(machines, corpus, tmp_path) as story:
        story.wait_for_step(10)
        story.wait_for_copies(2)
        machines.kill_node("node2", everything=False)
        story.wait_for_generation(2)
        machines.kill_node("node2")  # what is left of it
        machines.add_node("node2")

        check_end(story, undisturbed)
        assert sizes(story) == [2, 1, 2]
        assert max(story.steps_lost()) <= 2


def test_a_link_that_is_down_for_five_seconds_costs_at_most_a_snapshot_interval(
    machines: RayCluster, network: Network, corpus: Corpus, undisturbed: Ending, tmp_path: Path
) -> None:
    with on(machines, corpus, tmp_path) as story:
        story.wait_for_step(10)
        network.cut("node1")
        time.sleep(5)
        network.heal("node1")

        check_end(story, undisturbed)
        # As long as the hub's own patience: it waits it out, or trains on with one worker until the other is back.
        assert sizes(story) in ([2], [2, 1], [2, 1, 2])
        assert max(story.steps_lost(), default=0) <= 2
    machines.wait_alive({"head", "node1", "node2"}, 60)


def test_a_link_that_answers_late_is_no_fault(
    machines: RayCluster, network: Network, corpus: Corpus, undisturbed: Ending, tmp_path: Path
) -> None:
    with on(machines, corpus, tmp_path) as story:
        story.wait_for_step(5)
        network.latency("node2", 0.2)
        story.wait_for_step(20)
        network.latency("node2", 0)

        check_end(story, undisturbed)
        assert story.faults() == []
        assert len(story.generations()) == 1


def test_after_a_killed_driver_the_same_command_goes_on_from_the_memory_of_the_nodes(
    machines: RayCluster, corpus: Corpus, undisturbed: Ending, tmp_path: Path
) -> None:
    with on(machines, corpus, tmp_path) as story:
        story.wait_for_step(20)
        furthest = story.furthest()
        story.driver.kill()
        story.driver.wait(10)
        story.start()

        check_end(story, undisturbed)
        restored = story.events("restored")[-1]
        assert restored.text("tier") == "memory" and restored.whole("step") >= furthest - 2


def test_a_link_that_stays_down_leaves_the_run_to_the_other_node(
    machines: RayCluster, network: Network, corpus: Corpus, undisturbed: Ending, tmp_path: Path
) -> None:
    with on(machines, corpus, tmp_path) as story:
        story.wait_for_step(10)
        network.cut("node1")
        assert story.wait() == 0
        story.check_nobody_is_left(patience_s=120)  # out there they notice by themselves
        # What that machine has in memory is kept: it could have come back. It is replaced by another one.
        machines.kill_node("node1")
        machines.add_node("node1")

        check_end(story, undisturbed)
        assert sizes(story) == [2, 1]
        assert max(story.steps_lost()) <= 2


def test_a_lost_head_takes_the_cluster_with_it_and_the_same_command_on_a_new_one_goes_on_from_storage(
    machines: RayCluster, network: Network, corpus: Corpus, undisturbed: Ending, tmp_path: Path
) -> None:
    """The last story: it ends the cluster that the others use."""
    with on(machines, corpus, tmp_path) as story:
        story.wait_for("a state in storage", lambda: story.events("persisted"))
        machines.stop()
        kept = story.events("persisted")[-1].whole("step")
        with RayCluster(
            workers=2,
            cpus=1,
            head_cpus=0,
            network=network,
            health_check=PATIENT,
            environment_of_nodes=machines.environment_of_nodes,
        ) as again:
            story.start(again)

            check_end(story, undisturbed)
            restored = story.events("restored")[-1]
            assert restored.text("tier") == "storage" and restored.whole("step") >= kept

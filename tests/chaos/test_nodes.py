"""Nodes die, links break: the run goes on with who is left, from the copy in a peer's memory, and grows back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from network import Network
from nodes import HealthCheck, RayCluster
from small_corpus import Corpus
from training import Training, left_in_memory, nobody_left, spec_for, undisturbed

pytestmark = [pytest.mark.root, pytest.mark.soak]
STEPS = 300
# Ray takes a silent node for dead after about 10 s; the hub's watch is to be the first to know.
PATIENT = HealthCheck(period_ms=500, timeout_ms=2500, failures=4)
PROMPT = {"RAY_worker_niceness": "0"}  # a worker is not to starve on a machine that has other things to do


@pytest.fixture(scope="module")
def machines(network: Network) -> Iterator[RayCluster]:
    """A head without room for a worker, and two nodes with room for one each."""
    with RayCluster(
        workers=2, cpus=1, head_cpus=0, network=network, health_check=PATIENT, environment_of_nodes=PROMPT
    ) as started:
        started.wait_alive({"head", "node1", "node2"}, 60)
        yield started


@pytest.fixture(scope="module")
def smooth(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Any:
    storage = tmp_path_factory.mktemp("smooth")
    return undisturbed(corpus, spec_for(corpus, storage, STEPS), storage)


def test_a_lost_node_is_replaced_by_the_copy_of_its_state_and_a_new_node_lets_the_run_grow_back(
    machines: RayCluster, corpus: Corpus, smooth: Any, tmp_path: Path
) -> None:
    run = Training(spec_for(corpus, tmp_path, STEPS), tmp_path / "home", machines)
    driver = run.start()
    run.wait_for_step(10)
    machines.kill_node("node1")
    run.wait_for(lambda: run.sizes() == [2, 1], "one worker trains on", 30)
    shrunk = run.events("restored")[-1]
    machines.add_node("node1")
    run.wait_for(lambda: run.sizes() == [2, 1, 2], "two workers train again", 60)
    status = driver.wait(120)

    assert status == 0, driver.output()[-3000:]
    assert run.faults() == ["node"], run.story()
    assert shrunk.text("tier") == "memory" and shrunk.whole("step") >= 9
    run.assert_whole(STEPS)
    assert run.losses()[STEPS] == pytest.approx(smooth[1][STEPS], rel=1e-3)
    assert nobody_left(machines) and not left_in_memory(machines, list(machines.nodes))

"""An endpoint over several nodes: a replica on each, one node dies, the endpoint answers on and fills up again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from network import Network
from nodes import HealthCheck, RayCluster
from processes import Driver

from tigerbot.models import build, load_tokenizer, save_model
from tigerbot_jobs.data.tokenizer import train_tokenizer

pytestmark = [pytest.mark.root, pytest.mark.soak, pytest.mark.timeout(900)]

PORT = 8000
LINES = ["The fox sings in the river at night.", "狐狸在河边唱歌。"] * 20
# In the head's namespaces, where the endpoint's port is: status and replica of so many answers, a line each.
ASK = """
import sys, httpx
body = {"model": "tiger", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 2, "verify": False}
for _ in range(int(sys.argv[1])):
    try:
        answer = httpx.post("http://127.0.0.1:8000/v1/chat/completions", json=body, timeout=60)
        print(answer.status_code, answer.headers.get("x-tiger-replica", ""))
    except httpx.TransportError as error:
        print(type(error).__name__, "")
"""


class Served:
    """`tiger serve` on the head, and who asks it."""

    def __init__(self, cluster: RayCluster, folder: Path) -> None:
        train_tokenizer(LINES, 600, folder / "tokenizer")
        tokenizer = load_tokenizer(folder / "tokenizer")
        save_model(build("tiny", len(tokenizer), seed=1), tokenizer, folder / "model")
        raw = {
            "kind": "serve",
            "name": "nodes",
            "members": {"creative": str(folder / "model")},
            "engine": {"slots": 4, "max_length": 256},
            "http": {"port": PORT},
            "scale": {"threads": 1, "replicas": 2, "replicas_per_node": 1},
            "storage": {"uri": str(folder)},
        }
        (folder / "nodes.yaml").write_text(yaml.safe_dump(raw))
        self._cluster, self._note = cluster, folder / "nodes/endpoint.json"
        command = [sys.executable, "-m", "tigerbot.cli", "serve", str(folder / "nodes.yaml")]
        self.driver: Driver = cluster.run_driver(command, cwd=folder)

    def until(self, what: str, holds: Callable[[], Any], timeout_s: float = 240) -> None:
        end = time.monotonic() + timeout_s
        while not holds():
            assert not self.driver.ended, self.driver.output()[-3000:]
            assert time.monotonic() < end, f"not within {timeout_s} s: {what}\n{self.driver.output()[-2000:]}"
            time.sleep(0.5)

    @property
    def replicas(self) -> int:
        try:
            return int(json.loads(self._note.read_text())["note"].split()[0])
        except (OSError, ValueError, KeyError):
            return 0

    def ask(self, count: int) -> list[tuple[str, str]]:
        command = [*self._cluster.command("head"), sys.executable, "-c", ASK, str(count)]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
        return [(status, replica) for status, _, replica in (line.partition(" ") for line in lines)]

    def nodes(self) -> list[str]:
        """That have a replica."""
        workers = [node for node in self._cluster.nodes if node != "head"]
        return [node for node in workers if self._cluster.workers_named("ServeReplica", node=node)]


@pytest.fixture
def cluster(network: Network) -> Iterator[RayCluster]:
    """A head without room for a replica, and two nodes with room for two each."""
    with RayCluster(workers=2, cpus=2, head_cpus=0, network=network, health_check=HealthCheck()) as started:
        started.wait_alive({"head", "node1", "node2"}, 90)
        yield started


def test_replicas_are_on_different_nodes_and_the_loss_of_one_leaves_the_other_answering(
    cluster: RayCluster, tmp_path: Path
) -> None:
    served = Served(cluster, tmp_path)
    served.until("two replicas", lambda: served.replicas == 2)
    assert served.nodes() == ["node1", "node2"]
    before = served.ask(20)
    assert {status for status, _ in before} == {"200"}
    assert len({replica for _, replica in before}) == 2

    cluster.kill_node("node2")
    served.until("one replica", lambda: served.replicas == 1)
    after = served.ask(10)
    assert {status for status, _ in after} == {"200"}
    assert len({replica for _, replica in after}) == 1

    cluster.add_node("node2")
    served.until("two replicas again", lambda: served.replicas == 2)
    assert served.nodes() == ["node1", "node2"]
    assert {status for status, _ in served.ask(10)} == {"200"}

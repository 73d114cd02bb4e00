"""A node is about to go: the cloud's file, SIGTERM, Ray's draining, each as one notice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pretend_ranks import Clock

from tigerbot_jobs.train.watch.notices import (
    ASSUMED_S,
    FILE_VARIABLE,
    NoticeFile,
    SigtermNotice,
    drain_notices,
)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("", ASSUMED_S),
        ("30", 30),
        ('{"deadline_s": 45}', 45),
        ('{"deadline": DATE}', 60),
        ('{"action": "terminate"}', ASSUMED_S),
        ("<html>", ASSUMED_S),
    ],
)
def test_a_file_that_appears_is_a_notice_with_the_time_it_names(text: str, left: float, tmp_path: Path) -> None:
    path, now = tmp_path / "notice", time.time()
    file = NoticeFile("n1", path, clock=lambda: now)
    before = file.read()

    path.write_text(text.replace("DATE", str(now + 60)))
    os.utime(path, (now, now))

    notice = file.read()
    assert before is None and notice is not None
    assert (notice.node, notice.source) == ("n1", "file") and notice.deadline_s == pytest.approx(left, abs=0.01)


def test_the_file_is_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = NoticeFile("n1").read()
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "notice"))
    (tmp_path / "notice").write_text("10")

    assert without is None and NoticeFile("n1").read() is not None


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("replace", [False, True])
def test_sigterm_sets_a_flag_and_the_handler_before_it_is_called_unless_replaced(handler: None, replace: bool) -> None:
    clock, heard = Clock(), []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    notice = SigtermNotice("n1", grace_s=10, replace=replace, clock=clock)
    notice.install()
    quiet = notice.read()

    signal.raise_signal(signal.SIGTERM)
    clock.now += 4
    signal.raise_signal(signal.SIGTERM)

    said = notice.read()
    assert quiet is None and said is not None and said.deadline_s == 6
    assert len(heard) == (0 if replace else 2)


def test_uninstalled_the_handler_before_is_back(handler: None) -> None:
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    notice = SigtermNotice("n1", grace_s=10)
    notice.install()

    notice.uninstall()
    signal.raise_signal(signal.SIGTERM)

    assert heard and notice.read() is None


def test_only_our_own_nodes_are_noticed_the_most_urgent_first() -> None:
    notices = drain_notices({"aa": 50.0, "bb": 5.0, "cc": 1.0}, ["aa", "bb", "dd"])

    assert [(notice.node, notice.source) for notice in notices] == [("bb", "ray"), ("aa", "ray")]


_DRAIN = """
import json, time, ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from tigerbot_jobs.train.watch.notices import draining_nodes

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
doomed = cluster.add_node(num_cpus=1)
lasting = cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
# Idle, a drained node would leave at once: something must run on it.
@ray.remote(num_cpus=1)
class Works:
    def ready(self):
        return True
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
on = lambda node: NodeAffinitySchedulingStrategy(node.node_id, soft=False)
working = [Works.options(scheduling_strategy=on(node)).remote() for node in (doomed, lasting)]
assert all(ray.get([works.ready.remote() for works in working]))
before = draining_nodes()
gcs = ray._raylet.GcsClient(address=cluster.address)
reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
for node, deadline in ((doomed, int((time.time() + 90) * 1000)), (lasting, 0)):
    accepted, why = gcs.drain_node(node.node_id, reason, "spot", deadline)
    assert accepted, why
until = time.time() + 20
while len(found := draining_nodes()) < 2 and time.time() < until:
    time.sleep(0.1)
print("FOUND", json.dumps([before, found.get(doomed.node_id), found.get(lasting.node_id)]))
ray.shutdown()
cluster.shutdown()
"""


def test_a_node_that_ray_drains_is_seen_with_its_time_left() -> None:
    done = subprocess.run([sys.executable, "-c", _DRAIN], capture_output=True, text=True, timeout=150)

    assert done.returncode == 0, done.stderr[-3000:]
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    before, timed, untimed = json.loads(said.removeprefix("FOUND "))
    assert before == {} and 60 < timed <= 90 and untimed == ASSUMED_S

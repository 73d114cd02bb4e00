"""A cluster that does not come is one line, whatever Ray makes of it; one that goes takes every process along."""

from __future__ import annotations

import os
import signal
from typing import Any

import psutil
import pytest

from tigerbot.cluster import connect
from tigerbot.errors import ClusterError

ray = pytest.importorskip("ray")  # after tigerbot, which says how Ray authenticates


def test_a_local_cluster_that_does_not_start_in_time_is_a_cluster_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_slow(**about: Any) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(ray, "init", too_slow)

    with pytest.raises(ClusterError, match="timed out during startup"):
        connect()


def test_a_cluster_that_starts_at_the_second_try_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    start, tries = ray.init, []

    def late(**about: Any) -> Any:
        tries.append(about)
        if len(tries) == 1:
            raise Exception("The current node timed out during startup.")
        return start(**about)

    monkeypatch.setattr(ray, "init", late)

    cluster = connect(num_cpus=1)

    assert cluster.local and len(tries) == 2
    cluster.stop()


def test_a_worker_that_does_not_end_by_itself_goes_with_its_cluster() -> None:
    cluster = connect(num_cpus=1)
    worker = psutil.Process(ray.get(ray.remote(lambda: os.getpid()).remote(), timeout=60))
    worker.send_signal(signal.SIGSTOP)

    cluster.stop()

    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE

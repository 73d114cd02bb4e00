"""A cluster that does not come is one line, whatever Ray makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from tigerbot.cluster import connect
from tigerbot.errors import ClusterError


def test_a_local_cluster_that_does_not_start_in_time_is_a_cluster_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_slow(**about: Any) -> None:
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr(ray, "init", too_slow)

    with pytest.raises(ClusterError, match="timed out during startup"):
        connect()

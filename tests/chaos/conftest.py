"""The clusters that stories break; each takes seconds to start, so a module shares one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from network import Network, needs_network
from nodes import RayCluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head and one worker node that share this machine."""
    with RayCluster(workers=1) as started:
        yield started


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    needs_network()
    with Network() as made:
        yield made


@pytest.fixture(scope="module")
def machines(network: Network) -> Iterator[RayCluster]:
    """A head and one worker node, each a machine of its own."""
    with RayCluster(workers=1, network=network) as started:
        yield started

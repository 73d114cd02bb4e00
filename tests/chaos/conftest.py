"""What the stories share. A cluster takes seconds to start and each story wants its own kind: a module keeps one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from network import Network, needs_network


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """A network of our own; skips without root."""
    needs_network()
    with Network() as made:
        yield made

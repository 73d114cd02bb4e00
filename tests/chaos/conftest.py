"""What the stories share. A cluster takes seconds to start and each story wants its own kind: a module keeps one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import Network, needs_network

sys.path.append(str(Path(__file__).parents[1] / "jobs/train"))
from small_corpus import Corpus, make_corpus


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """A network of our own; skips without root."""
    needs_network()
    with Network() as made:
        yield made


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"))

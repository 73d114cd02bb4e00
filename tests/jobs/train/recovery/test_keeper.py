"""A keeper copies its node's snapshots to a peer: to each peer at once, and again until that one has taken them."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tigerbot_jobs.train.memory import SnapshotBuffer
from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery.keeper import SHM, Keeper
from tigerbot_jobs.train.recovery.shard_server import ShardServer, push_shard
from tigerbot_jobs.train.recovery.wire import decode, encode
from tigerbot_jobs.train.shard import Shard, ShardMeta, Slice

DEADLINE_S = 60.0
TOKEN = "secret"
META = ShardMeta(0, 1, 2, 2, 3, (Slice("w", (8,), 0, 8, 0, 0),))


class PretendHub:
    """Tells its one keeper what to do, and hears what it says."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._said: queue.Queue[say.Copied] = queue.Queue()
        threading.Thread(target=self._hear, daemon=True).start()

    def tell(self, message: say.Message) -> None:
        self._line.sendall(encode(message))

    def copied(self) -> say.Copied:
        """The next copy it is told of."""
        return self._said.get(timeout=DEADLINE_S)

    @property
    def heard_nothing_more(self) -> bool:
        return self._said.empty()

    def close(self) -> None:
        self._listener.close()

    def _hear(self) -> None:
        self._line, _ = self._listener.accept()
        with contextlib.suppress(OSError), self._line.makefile("rb") as lines:
            for line in lines:
                if isinstance(message := decode(line), say.Copied):
                    self._said.put(message)


class Peer(ShardServer):
    """Another node's shards. It takes the first copies that it is asked to not, `refuses` of them."""

    def __init__(self, root: Path, *, refuses: int = 0) -> None:
        self.asked, self._refuses = 0, refuses
        root.mkdir(parents=True)
        super().__init__(("127.0.0.1", 0), TOKEN, root, root)
        self.address = f"127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def _refused(self) -> bool:
        self.asked += 1
        return self.asked <= self._refuses

    closed = property(_refused, lambda self, value: None)

    def steps(self) -> list[int]:
        """Of the copies that it has."""
        return sorted(Shard.open(path).meta.step for path in self.folder.glob("mirror-*"))


@pytest.fixture
def run_id() -> Iterator[str]:
    name = f"test-keeper-{os.getpid()}"
    yield name
    shutil.rmtree(SHM / f"tiger-{name}", ignore_errors=True)


@pytest.fixture
def hub(run_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendHub]:
    """With a keeper on its line."""
    monkeypatch.setenv("TIGER_NODE", "here")
    made = PretendHub()
    keeper = Keeper(made.address, TOKEN, run_id, str(tmp_path), "127.0.0.1", "")
    yield made
    made.tell(say.Stop(say.KEPT))
    keeper.serve()
    made.close()


@pytest.fixture
def snapshot(run_id: str, hub: PretendHub) -> Callable[[int], None]:
    """Keeps a state of a step, as a worker of this node does."""
    state = {"0.master": torch.arange(8.0), "0.step": torch.ones(1)}
    path = SHM / f"tiger-{run_id}" / "here" / "worker-w.3"
    buffer = SnapshotBuffer.create(path, META, state)

    def keep(step: int) -> None:
        buffer.write(state, step=step, generation=3, extra={})

    return keep


@pytest.fixture
def peer_of(tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(name: str, *, refuses: int = 0) -> Peer:
        made.append(Peer(tmp_path / name, refuses=refuses))
        return made[-1]

    yield make
    for peer in made:
        peer.shutdown()
        peer.server_close()


def until(true: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(int(DEADLINE_S / 0.01)):
        if true():
            return
        waited.wait(0.01)
    raise AssertionError("it never was")


def test_the_first_copy_for_a_peer_is_said_and_later_ones_are_made_in_silence(
    hub: PretendHub, snapshot: Callable[[int], None], peer_of: Callable[..., Peer]
) -> None:
    peer = peer_of("there")
    snapshot(1)

    hub.tell(say.Mirror(peer.address))
    first = hub.copied()
    snapshot(2)
    until(lambda: peer.steps() == [1, 2])

    assert first == say.Copied("worker-w.3", peer.address, 1)
    assert (peer.folder / "mirror-worker-w.3.2.3.1.2.2").exists()  # step, generation, rank, world size, stage
    assert hub.heard_nothing_more


def test_a_new_peer_has_the_newest_snapshot_before_there_is_another(
    hub: PretendHub, snapshot: Callable[[int], None], peer_of: Callable[..., Peer]
) -> None:
    old, new = peer_of("old"), peer_of("new")
    hub.tell(say.Mirror(old.address))
    snapshot(1)
    hub.copied()
    snapshot(2)
    until(lambda: old.steps() == [1, 2])

    hub.tell(say.Mirror(new.address))

    assert hub.copied() == say.Copied("worker-w.3", new.address, 2)
    assert new.steps() == [2]


def test_a_copy_that_the_peer_does_not_take_is_none_and_is_tried_again(
    hub: PretendHub, snapshot: Callable[[int], None], peer_of: Callable[..., Peer]
) -> None:
    peer = peer_of("there", refuses=3)
    snapshot(7)

    hub.tell(say.Mirror(peer.address))
    said = hub.copied()

    assert said == say.Copied("worker-w.3", peer.address, 7) and hub.heard_nothing_more
    assert peer.asked == 4 and peer.steps() == [7]


def test_whoever_pushes_to_a_peer_that_takes_nothing_more_hears_of_it(peer_of: Callable[..., Peer]) -> None:
    about = {"name": "worker-w.3", "step": 1, "generation": 3, "rank": 0, "world_size": 1, "zero_stage": 2}

    for peer, token in ((peer_of("closed", refuses=1), TOKEN), (peer_of("open"), "another run's")):
        with pytest.raises(OSError):  # a reset or an end, as the kernel has it
            push_shard(peer.address, token, about, b"state" * 1000)

        assert list(peer.folder.iterdir()) == []

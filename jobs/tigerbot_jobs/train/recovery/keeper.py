"""One process a node, which outlives the workers: it keeps their snapshots safe and ends those that are stuck.

It reads what the workers leave in shared memory (it needs no torch for that), copies every new snapshot to another
node's keeper, uploads the ones that are to be kept, and serves shards to whoever restores. It dies with the driver; what
is in shared memory does not.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

from tigerbot.errors import TigerError
from tigerbot.storage import Store, open_store
from tigerbot_jobs.train.checkpoint import file_of, persist_file
from tigerbot_jobs.train.memory import Snapshot, read_snapshots, release
from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery.link import Link
from tigerbot_jobs.train.recovery.shard_server import ShardServer, push_shard
from tigerbot_jobs.train.watch.notices import NoticeFile

SHM = Path("/dev/shm")
_MIRROR_S, _NO_PEER_S = 0.05, 0.5
_CLEAR_S = 2.0
_NOTICE_S = 0.5


def node_name() -> str:
    """What a node is called, the same after its processes have died: its host, or TIGER_NODE where one host plays several."""
    return os.environ.get("TIGER_NODE") or socket.gethostname()


def shm_folder(run_id: str, node: str) -> Path:
    """Where the snapshots of a run lie on a node."""
    return SHM / f"tiger-{run_id}" / node


class Keeper:
    """The keeper of one node for one run.

    Args:
        hub, token: where the hub is, and the run's secret.
        run_id: names the run in shared memory.
        uri: of the storage.
        address: of this node, as others reach it.
        ray_node: Ray's id of it.
    """

    def __init__(self, hub: str, token: str, run_id: str, uri: str, address: str, ray_node: str) -> None:
        self._token, self._uri = token, uri
        self._node = node_name()
        self._folder = shm_folder(run_id, self._node)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._store: Store | None = None
        self._peer = ""
        self._end = threading.Event()
        self._reason = ""
        self._server = ShardServer((address, 0), token, SHM / f"tiger-{run_id}", self._folder)
        threading.Thread(target=self._server.serve_forever, daemon=True, name="shards").start()
        served = f"{address}:{self._server.server_address[1]}"
        hello = say.Hello(
            token, "keeper", f"keeper-{self._node}", self._node, socket.gethostname(), served, os.getpid(), ray_node
        )
        self._link = Link(hub, hello, self._take)
        threading.Thread(target=self._mirror, daemon=True, name="mirror").start()
        threading.Thread(target=self._await_notice, daemon=True, name="notice").start()

    def serve(self) -> str:
        """Until the hub stops it, or is gone; then shared memory is kept only if the run is to go on."""
        self._end.wait()
        self._server.shutdown()
        if self._reason == say.KEPT:
            self._clear()
        return self._reason

    def _clear(self) -> None:
        self._server.closed = True
        # A copy that was on its way may arrive in the middle of this.
        until = time.monotonic() + _CLEAR_S
        while self._folder.exists() and time.monotonic() < until:
            shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.parent.rmdir()

    def _take(self, message: say.Message) -> None:
        match message:
            case say.Look():
                self._link.send(say.Held(message.request, self._inventory()))
            case say.Persist():
                threading.Thread(target=self._persist, args=(message,), daemon=True).start()
            case say.Mirror():
                self._peer = message.address
            case say.Kill():
                threading.Thread(target=self._kill, args=(message,), daemon=True).start()
            case say.Stop():
                self._reason = self._reason or message.reason  # the line that closes afterwards says nothing new
                self._end.set()

    # What is here.

    def _inventory(self) -> list[say.ShardAt]:
        found = [self._shard_at(path, one) for path in self._folder.glob("worker-*") for one in _snapshots(path)]
        for path in self._folder.glob("mirror-*"):
            with contextlib.suppress(OSError, ValueError):
                found.append(_mirrored(path, self._node, self._served))
        return found

    @property
    def _served(self) -> str:
        return f"{self._server.server_address[0]}:{self._server.server_address[1]}"

    def _shard_at(self, path: Path, one: Snapshot) -> say.ShardAt:
        meta = one.shard().meta
        return say.ShardAt(
            str(path), one.begin, len(one.view), self._node, self._served,
            meta.step, meta.generation, meta.rank, meta.world_size, meta.zero_stage,
        )  # fmt: skip

    # To storage.

    def _persist(self, order: say.Persist) -> None:
        began = time.monotonic()
        files, problem = [], ""
        try:
            self._store = self._store or open_store(self._uri)
            for path, rank in order.files:
                image = _copied(Path(path), order.step, order.generation)
                if image is None:
                    raise LookupError(f"gone: the snapshot of step {order.step} was overwritten before it was read")
                about = persist_file(self._store, order.key, memoryview(image), file_of(rank))
                files.append(about.model_dump())
        except (TigerError, OSError, LookupError) as error:
            problem = str(error)
        self._link.send(say.Put(order.request, files, time.monotonic() - began, problem))

    # To a peer.

    def _mirror(self) -> None:
        sent: dict[str, int] = {}
        before = ""
        while not self._end.wait(_MIRROR_S if self._peer else _NO_PEER_S):
            peer = self._peer
            if peer != before:  # it has none of them yet
                sent, before = {}, peer
            if not peer:
                continue
            for path in self._folder.glob("worker-*"):
                with contextlib.suppress(OSError, ValueError):
                    newest = next(iter(_snapshots(path)), None)
                    if newest is None or sent.get(path.name) == newest.step:
                        continue
                    if self._copy(newest, path.name, peer):
                        if path.name not in sent:
                            self._link.send(say.Copied(path.name, peer, newest.step))
                        sent[path.name] = newest.step

    def _copy(self, one: Snapshot, name: str, peer: str) -> bool:
        """Whether the peer has it now: it may be overwritten while it is read."""
        meta, image = one.shard().meta, bytes(one.view)
        if not one.unchanged():
            return False
        names = ("step", "generation", "rank", "world_size", "zero_stage")
        push_shard(peer, self._token, {key: getattr(meta, key) for key in names} | {"name": name}, image)
        return True

    # The end of this node.

    def _await_notice(self) -> None:
        file = NoticeFile(self._node)
        while not self._end.wait(_NOTICE_S):
            notice = file.read()
            if notice is not None:
                self._link.send(say.Noticed(notice.source, notice.deadline_s))
                return

    # The stuck.

    def _kill(self, order: say.Kill) -> None:
        stacks = self._folder / f"stacks-{order.pid}"
        with contextlib.suppress(OSError):
            os.kill(order.pid, signal.SIGUSR1)  # the worker's faulthandler writes them; a stopped process does not
            time.sleep(0.2)
        with contextlib.suppress(OSError):
            os.kill(order.pid, signal.SIGKILL)
        text = stacks.read_text(errors="replace") if stacks.exists() else ""
        self._link.send(say.Killed(order.request, text))


def _snapshots(path: Path) -> list[Snapshot]:
    with contextlib.suppress(OSError, ValueError, TigerError):
        return read_snapshots(path)
    return []


def _copied(path: Path, step: int, generation: int) -> bytes | None:
    """The image of a snapshot, if it was whole before and after it was copied."""
    if path.name.startswith("mirror-"):
        return path.read_bytes() if path.exists() else None

    found = next((one for one in _snapshots(path) if (one.step, one.generation) == (step, generation)), None)
    if found is None:
        return None
    image = bytes(found.view)
    whole = found.unchanged()
    release(path, found)
    return image if whole else None


def _mirrored(path: Path, node: str, served: str) -> say.ShardAt:
    """mirror-<worker>.<step>.<generation>.<rank>.<world>.<stage>"""
    step, generation, rank, world_size, stage = map(int, path.name.rsplit(".", 5)[1:])
    return say.ShardAt(str(path), 0, path.stat().st_size, node, served, step, generation, rank, world_size, stage)

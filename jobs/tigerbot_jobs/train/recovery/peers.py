"""Who holds a line to the hub: workers, and a keeper for every node; and what keepers are asked.

It knows the wire and who may speak on it. What a message means, and what a death means, is the hub's.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery.wire import LINE_LIMIT, decode, encode

_HELLO_S = 10.0
_LOOK_S = 2.0
_KEEPER_S = 30.0  # a keeper of a node that has one, or will have one, is waited for
Make = Callable[[int], say.Message]  # a question, by the number of the request


@dataclass
class Peer:
    """One connection."""

    hello: say.Hello
    writer: asyncio.StreamWriter
    seen: float
    asked: set[asyncio.Future[Any]] = field(default_factory=set)  # what it has not answered yet

    def send(self, message: say.Message) -> None:
        with contextlib.suppress(Exception):
            self.writer.write(encode(message))


class Listener(Protocol):
    """Who hears of the lines; called from the hub's thread."""

    def worker_joined(self, peer: Peer) -> None: ...

    def worker_left(self, peer: Peer) -> None: ...

    def keeper_left(self, node: str) -> None: ...

    def wants_keeper(self, hello: say.Hello) -> None:
        """A node has a worker and no keeper."""
        ...

    def took(self, peer: Peer, message: say.Message) -> None: ...


class Peers:
    """The lines of one run. Everything but `start` is for the thread of its event loop.

    Args:
        token: the run's secret; who does not know it is not let in.
        listener: hears who comes, goes and speaks.
    """

    def __init__(self, token: str, listener: Listener) -> None:
        self._token, self._listener = token, listener
        self.workers: dict[str, Peer] = {}
        self.keepers: dict[str, Peer] = {}  # by node
        self._condemned: set[str] = set()  # workers that a keeper kills: they are not let in again
        self._nodes: dict[str, str] = {}  # that have a keeper, or will have: Ray's id of each
        self._requests: dict[int, asyncio.Future[Any]] = {}
        self._number = 0

    async def listen(self, host: str) -> tuple[asyncio.Server, str]:
        """Open a free port of `host`; the server and its address."""
        server = await asyncio.start_server(self._connection, host, 0, limit=LINE_LIMIT)
        return server, f"{host}:{server.sockets[0].getsockname()[1]}"

    async def stop(self, reason: str) -> None:
        """Tell everybody."""
        for peer in (*self.workers.values(), *self.keepers.values()):
            peer.send(say.Stop(reason))
            with contextlib.suppress(Exception):
                await asyncio.wait_for(peer.writer.drain(), 1)

    def close(self) -> None:
        for peer in (*self.workers.values(), *self.keepers.values()):
            peer.writer.transport.abort()

    def on(self, node: str) -> list[str]:
        """The workers of a node."""
        return [name for name, peer in self.workers.items() if peer.hello.node == node]

    def node_of(self, worker: str) -> str:
        return self.workers[worker].hello.node if worker in self.workers else ""

    def condemn(self, worker: str) -> Peer | None:
        """Take a worker's line away for good; its node's keeper, if there is one, is to end it."""
        peer = self.workers.pop(worker, None)
        if peer is None:
            return None
        peer.writer.transport.abort()
        keeper = self.keepers.get(peer.hello.node)
        if keeper is not None:
            self._condemned.add(worker)
        return keeper

    def drop_keeper(self, node: str) -> None:
        """Nobody asks this keeper any more, nobody sends it copies, and nobody waits for its answers."""
        self._nodes.pop(node, None)
        keeper = self.keepers.pop(node, None)
        if keeper is None:
            return
        self._pair_keepers()
        self._listener.keeper_left(node)
        keeper.writer.transport.abort()
        for future in keeper.asked:
            if not future.done():
                future.set_exception(ConnectionResetError(f"the keeper of {node} is gone"))

    async def look(self) -> list[say.ShardAt]:
        """The shards that all keepers hold."""
        asked = [self.ask(keeper, lambda request: say.Look(request), _LOOK_S) for keeper in self.keepers.values()]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        return [shard for answer in answers if isinstance(answer, say.Held) for shard in answer.shards]

    async def keepers_of(self, workers: Iterable[str], timeout_s: float) -> None:
        """Wait until the nodes of these workers have their keepers."""
        until = time.monotonic() + timeout_s
        nodes = {self.node_of(worker) for worker in workers} - {""}
        while nodes - self.keepers.keys() and time.monotonic() < until:
            await asyncio.sleep(0.02)

    async def ask_node(self, node: str, make: Make, timeout_s: float) -> Any:
        """Ask the keeper of a node, which is waited for where there will be one.

        Raises:
            TimeoutError: it did not answer in time.
            LookupError: the node is gone, and what it had with it.
        """
        until = time.monotonic() + _KEEPER_S
        while node in self._nodes and node not in self.keepers and time.monotonic() < until:
            await asyncio.sleep(0.05)
        keeper = self.keepers.get(node)
        if keeper is None:
            raise TimeoutError if node in self._nodes else LookupError(node)
        return await self.ask(keeper, make, timeout_s)

    async def ask(self, keeper: Peer, make: Make, timeout_s: float) -> Any:
        """A keeper's answer.

        Raises:
            TimeoutError: there was none in time.
            ConnectionError: the keeper is gone.
        """
        self._number += 1
        number = self._number
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._requests[number] = future
        keeper.asked.add(future)
        keeper.send(make(number))
        try:
            return await asyncio.wait_for(future, timeout_s)
        finally:
            self._requests.pop(number, None)
            keeper.asked.discard(future)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = None
        try:
            hello = decode(await asyncio.wait_for(reader.readline(), _HELLO_S))
            if not isinstance(hello, say.Hello) or not hmac.compare_digest(hello.token, self._token):
                return
            if hello.worker in self._condemned:
                return
            peer = Peer(hello, writer, time.monotonic())
            self._join(peer)
            while line := await reader.readline():
                peer.seen = time.monotonic()
                self._take(peer, decode(line))
        except (TimeoutError, ValueError, ConnectionError, asyncio.LimitOverrunError):
            pass  # a stranger, or a line that broke: `_leave` says what that means
        finally:
            writer.close()
            if peer is not None:
                self._leave(peer)

    def _join(self, peer: Peer) -> None:
        hello = peer.hello
        if hello.role == "keeper":
            self.keepers[hello.node] = peer
            self._pair_keepers()
            return
        before = self.workers.get(hello.worker)
        if before is not None:
            self._leave(before)  # its line broke, and it noticed first
            before.writer.transport.abort()
        self.workers[hello.worker] = peer
        self._listener.worker_joined(peer)
        if self._nodes.get(hello.node) != hello.ray_node:
            self._nodes[hello.node] = hello.ray_node
            self._listener.wants_keeper(hello)

    def _leave(self, peer: Peer) -> None:
        hello = peer.hello
        if hello.role == "keeper":
            if self.keepers.get(hello.node) is peer:
                self.drop_keeper(hello.node)
                neighbour = next(iter(self.on(hello.node)), None)
                if neighbour is not None:
                    about = self.workers[neighbour].hello
                    self._nodes[hello.node] = about.ray_node
                    self._listener.wants_keeper(about)
        elif self.workers.get(hello.worker) is peer:  # else it was ended, or has come back on another line
            del self.workers[hello.worker]
            self._listener.worker_left(peer)

    def _take(self, peer: Peer, message: say.Message) -> None:
        if isinstance(message, say.Held | say.Put | say.Killed):
            future = self._requests.pop(message.request, None)
            if future is not None and not future.done():
                future.set_result(message)
        else:
            self._listener.took(peer, message)

    def _pair_keepers(self) -> None:
        """Every node's snapshots go to the next node's keeper, in a ring: never to its own."""
        nodes = sorted(self.keepers)
        for index, node in enumerate(nodes):
            buddy = nodes[(index + 1) % len(nodes)]
            self.keepers[node].send(say.Mirror(self.keepers[buddy].hello.address if buddy != node else ""))

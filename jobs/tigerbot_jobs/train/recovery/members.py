"""The workers of a run by line and by rank: who is a member, how all are told, how one that is stuck is ended.

It decides nothing: who is to be ended, and what follows, is said by others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from tigerbot_jobs.train.recovery import messages as say
from tigerbot_jobs.train.recovery.books import Books
from tigerbot_jobs.train.recovery.peers import Peer, Peers
from tigerbot_jobs.train.recovery.rendezvous import Rendezvous
from tigerbot_jobs.train.watch.hangs import HangWatch

Spawn = Callable[[Coroutine[Any, Any, Any]], None]  # work beside the hub's own, which it joins


class Members:
    """Peers and rendezvous of one run, seen together."""

    def __init__(self, peers: Peers, rendezvous: Rendezvous, books: Books, watch: HangWatch, spawn: Spawn) -> None:
        self.peers, self.rendezvous = peers, rendezvous
        self._books, self._watch, self._spawn = books, watch, spawn

    def tell(self, message: say.Message, *, but: Peer | None = None) -> None:
        """Every member of the current generation that has a line, `but` for one."""
        for member in self.rendezvous.current.members:
            peer = self.peers.workers.get(member)
            if peer is not None and peer is not but:
                peer.send(message)

    def rank_of(self, worker: str) -> int:
        """Its rank in the current generation; -1: it has none."""
        members = self.rendezvous.current.members
        return members.index(worker) if worker in members else -1

    def end(self, worker: str, reason: str) -> None:
        """A worker that does not answer is killed by its node's keeper, and is lost whether that succeeds or not."""
        peer = self.peers.workers.get(worker)
        if peer is not None:
            self._books.decide("kill", f"{worker}: {reason}")
            keeper = self.peers.condemn(worker)
            if keeper is not None:
                self._spawn(self._kill(keeper, peer.hello, reason))
        self._watch.forget(worker)
        self.rendezvous.lost(worker)

    async def _kill(self, keeper: Peer, hello: say.Hello, reason: str) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):
            answer = await self.peers.ask(keeper, lambda request: say.Kill(request, hello.pid, reason), 5.0)
            self._books.log("stacks", worker=hello.worker, stacks=answer.stacks[-4000:])

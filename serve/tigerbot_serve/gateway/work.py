"""The engine's share of one request: what is reserved for it is settled when its last token is counted, once.

A client that leaves does not wait for the engine to stop; the tokens decoded until then are waited for apart from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from tigerbot_serve.engine.ticket import Handle
from tigerbot_serve.gateway.ledger import Tokens
from tigerbot_serve.gateway.limits import Limiter, Reservation
from tigerbot_serve.gateway.visit import Visit, Watched

STOPS_WITHIN_S = 30.0

_ENDING: set[asyncio.Task[None]] = set()  # the loop holds tasks weakly


class Work:
    """What a request holds, from its reservation to its last token.

    Attributes:
        outstanding: tokens that it adds to what stands before the engine.
    """

    def __init__(self, visit: Visit, limiter: Limiter, held: Reservation, reserved: Tokens, outstanding: int) -> None:
        self.outstanding = outstanding
        self._visit, self._limiter, self._held, self._reserved = visit, limiter, held, reserved
        self._handles: list[Watched] = []
        visit.enter()

    def watch(self, handles: Sequence[Handle]) -> Any:
        """The same handles, whose events the visit sees."""
        self._handles = [Watched(handle, self._visit) for handle in handles]
        return self._handles

    def end(self) -> None:
        """Nobody reads the answer any more."""
        unfinished = [handle for handle in self._handles if not handle.finished]
        if not unfinished:
            self._settle(self._visit.tokens)
            return
        task = asyncio.get_running_loop().create_task(self._wait_for(unfinished))
        _ENDING.add(task)
        task.add_done_callback(_ENDING.discard)

    async def _wait_for(self, unfinished: list[Watched]) -> None:
        for handle in unfinished:
            handle.cancel()
        try:
            async with asyncio.timeout(STOPS_WITHIN_S):
                for handle in unfinished:
                    async for _ in handle:
                        pass
        except TimeoutError:
            self._settle(self._reserved)  # an engine that does not stop may have used all of it
            return
        self._settle(self._visit.tokens)

    def _settle(self, tokens: Tokens) -> None:
        self._limiter.settle(self._held, tokens)
        self._visit.leave()


class Settled:
    """A response after which its work has ended, however it ends."""

    def __init__(self, inner: ASGIApp, work: Work) -> None:
        self._inner, self._work = inner, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._inner(scope, receive, send)
        finally:
            self._work.end()

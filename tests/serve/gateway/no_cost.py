"""A decoder that answers at once, or when it is told to: what a test of the gateway needs of an engine."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from tigerbot_serve.engine.request import EngineStats, FinishEvent, FinishReason, Request, Summary, TokenEvent, Usage
from tigerbot_serve.engine.ticket import Handle


class NoCost:
    """Answers every request with four tokens.

    Args:
        hold: not before `release`.

    Attributes:
        submitted: all requests so far.
        outstanding: what its stats say.
        bug: raised by the next submits.
    """

    max_length = 512
    alive = True
    fingerprint = "fp_of_no_cost"

    def __init__(self, tokenizer: Any, *, hold: bool = False) -> None:
        self.tokenizer = tokenizer
        self.submitted: list[Request] = []
        self.outstanding = 0
        self.bug: Exception | None = None
        self._hold = hold
        self._waiting: dict[int, tuple[Request, Handle]] = {}
        self._lock = threading.Lock()

    def submit(self, request: Request, loop: asyncio.AbstractEventLoop) -> Handle:
        if self.bug is not None:
            raise self.bug
        handle = Handle(loop, self._drop_cancelled)
        with self._lock:
            self.submitted.append(request)
            if self._hold:
                self._waiting[id(handle)] = (request, handle)
                return handle
        _answer(request, handle)
        return handle

    def stats(self) -> EngineStats:
        return EngineStats(16, len(self._waiting), 0, self.outstanding, 4 * len(self.submitted), len(self.submitted))

    def release(self) -> None:
        """Answer what waits and everything after it."""
        with self._lock:
            self._hold = False
            waiting, self._waiting = list(self._waiting.values()), {}
        for request, handle in waiting:
            _answer(request, handle)

    def _drop_cancelled(self) -> None:
        with self._lock:
            gone = {place: pair for place, pair in self._waiting.items() if pair[1].cancelled}
            for place in gone:
                del self._waiting[place]
        for request, handle in gone.values():
            _answer(request, handle, "cancelled", tokens=0)


def _answer(request: Request, handle: Handle, reason: FinishReason = "stop", tokens: int = 4) -> None:
    events: list[Any] = [TokenEvent("hi ", 5, -0.1, (), None, None, 0.5) for _ in range(tokens)]
    usage = Usage(len(request.prompt_ids), tokens)
    handle.deliver([*events, FinishEvent(reason, usage, Summary(request.dial, 0.5, None, "unverified"))])

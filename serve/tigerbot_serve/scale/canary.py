"""Two engines in one replica, the rest's and the canary's, behind the one face that the gateway knows.

A second application would be a second hop, or a router that HAProxy does not ask; a second engine is neither, and costs
its memory in every replica. Who goes where is a hash of the caller, so a caller stays on one side, on every replica
alike. A replica takes its canary back by its own numbers; whoever keeps the endpoint does so by everyone's.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import asdict, fields
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from tigerbot.spec import CanarySpec
from tigerbot_serve.engine.request import EngineStats, Event, FinishEvent, Request, TokenEvent
from tigerbot_serve.scale.verdict import Tally, worse

log = logging.getLogger(__name__)

_CALLER: ContextVar[str] = ContextVar("tiger_caller", default="")
_ANSWERS: ContextVar[Any] = ContextVar("tiger_answers", default=None)  # the engine that took this request
_EVERY = 20  # answers between two looks at the numbers


def is_canary(caller: str, salt: str, percent: float) -> bool:
    """Whether a caller belongs to the canary's share."""
    digest = hashlib.sha256(f"{salt}\0{caller}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10_000 < percent * 100


def name_caller(user: str | None) -> None:
    """One key may speak for many people: `user` in the body tells them apart."""
    if user:
        _CALLER.set(f"{_CALLER.get()}\0{user}")


class Caller:
    """Names who asks, by key or, without one, by address."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            key = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            address = (scope.get("client") or ("",))[0]
            _CALLER.set(hashlib.sha256(key).hexdigest() if key else str(address))
        await self._app(scope, receive, send)


class TwoEngines:
    """The gateway's `Decoder` over both; what it does not know itself is the rest's."""

    def __init__(self, rest: Any, canary: Any, spec: CanarySpec) -> None:
        self.rest, self.canary, self._spec = rest, canary, spec
        self.tokenizer = rest.tokenizer
        self.max_length = min(rest.max_length, canary.max_length)
        self.tallies = {"rest": Tally(), "canary": Tally()}
        self.taken_back: str | None = None
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rest, name)

    @property
    def alive(self) -> bool:
        """Of the rest's engine: a dead canary is taken back, which is no reason to replace the replica."""
        return self.rest.alive

    @property
    def fingerprint(self) -> str:
        """Of the engine that took the request this is asked about, as whoever submitted it asks; else the rest's."""
        engine = _ANSWERS.get()
        return (self.canary if engine is self.canary else self.rest).fingerprint

    def submit(self, request: Request, loop: Any) -> Any:
        if not self.taken_back and not self.canary.alive:
            self.take_back("its engine has died")
        mine = not self.taken_back and is_canary(_CALLER.get(), self._spec.salt, self._spec.percent)
        engine, side = (self.canary, "canary") if mine else (self.rest, "rest")
        watched = _Watched(engine.submit(request, loop), lambda time: self._ended(side, time))
        _ANSWERS.set(engine)
        return watched

    def stats(self) -> EngineStats:
        one, other = self.rest.stats(), self.canary.stats()
        both = {f.name: getattr(one, f.name) + getattr(other, f.name) for f in fields(EngineStats)}
        return EngineStats(**both | {"gate_variation": max(one.gate_variation, other.gate_variation)})

    def take_back(self, why: str) -> None:
        """Send everybody to the rest's engine from now on."""
        if self.taken_back is None:
            self.taken_back = why
            log.warning("the canary is taken back: %s", why)

    def report(self) -> dict[str, Any]:
        """The numbers so far, as plain data."""
        with self._lock:
            sides = {side: asdict(tally) | {"times": list(tally.times)} for side, tally in self.tallies.items()}
        return {"taken_back": self.taken_back} | sides

    def _ended(self, side: str, seconds_per_token: float | None) -> None:
        with self._lock:
            self.tallies[side].add(seconds_per_token)
            canary, rest = self.tallies["canary"], self.tallies["rest"]
            if self.taken_back or (canary.answers + rest.answers) % _EVERY:
                return
            why = worse(canary, rest, min_answers=self._spec.min_answers, slower=self._spec.slower)
        if why:
            self.take_back(why)


class _Watched(AsyncIterator[Event]):
    """A handle whose end is told: seconds a token, None for an error, nothing for one whose client left."""

    def __init__(self, handle: Any, ended: Any) -> None:
        self._handle, self._ended = handle, ended
        self._began, self._tokens = time.monotonic(), 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> Event:
        event = await self._handle.__anext__()
        if isinstance(event, TokenEvent):
            self._tokens += 1
        elif isinstance(event, FinishEvent) and event.finish_reason != "cancelled":
            took = (time.monotonic() - self._began) / max(1, self._tokens)
            self._ended(None if event.finish_reason in ("error", "memory") else took)
        return event

"""`GET /v1/live`: what this replica does now, for the page's live panel, and how many replicas there are.

The engine's own numbers, tokens a second between readings, and the latencies of recent answers, which a middleware
measures from the request to the last byte. Each replica tells of itself under its name; whoever asks again and again
reaches them all in turn.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tigerbot_serve.gateway import shapes
from tigerbot_serve.gateway.decode import Decoder
from tigerbot_serve.gateway.recent import Outcomes

LIVE = "/v1/live"
ALONE = "alone"
WINDOW_S = 300.0  # latencies older than this say nothing about now
RATE_S = 10.0
REPLICAS_S = 2.0  # however many pages are open, Serve's controller is asked this often
ANSWERS = 512


@dataclass(frozen=True)
class Replicas:
    """This replica's name, and how many of its deployment are in each of Serve's states."""

    name: str
    states: dict[str, int]


class Live:
    """The replica's recent past: latencies of answers and marks of the token count."""

    def __init__(self, engine: Decoder, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._clock = engine, clock
        self._answers: deque[tuple[float, float]] = deque(maxlen=ANSWERS)
        self._marks: deque[tuple[float, int]] = deque([(clock(), engine.stats().tokens_decoded)])

    def took(self, seconds: float) -> None:
        """An answer was whole after so long."""
        self._answers.append((self._clock(), seconds))

    def reading(self, replicas: Replicas, recent: Outcomes) -> shapes.Live:
        """One look at the replica, as one of these."""
        now, stats = self._clock(), self._engine.stats()
        while self._answers and self._answers[0][0] < now - WINDOW_S:
            self._answers.popleft()
        seconds = sorted(seconds for _, seconds in self._answers)
        return shapes.Live(
            replica=replicas.name,
            replicas=replicas.states,
            slots=stats.slots,
            slots_used=stats.slots_used,
            queued=stats.queued,
            outstanding_tokens=stats.outstanding_tokens,
            tokens_decoded=stats.tokens_decoded,
            tokens_per_s=self._rate(now, stats.tokens_decoded),
            answers=len(seconds),
            p50_s=percentile(seconds, 0.50),
            p99_s=percentile(seconds, 0.99),
            **asdict(recent),
        )

    def _rate(self, now: float, decoded: int) -> float | None:
        """Tokens a second since the newest mark that is at least RATE_S old, or the oldest one there is."""
        while len(self._marks) > 1 and self._marks[1][0] <= now - RATE_S:
            self._marks.popleft()
        since, before = self._marks[0]
        if now - self._marks[-1][0] > 0.5:  # many pages that ask leave no more marks than one
            self._marks.append((now, decoded))
        return (decoded - before) / (now - since) if now > since else None


def add_live(
    app: Starlette, engine: Decoder, check_key: Callable[[Request], Any], recent: Callable[[], Outcomes]
) -> None:
    """Measure the app's answers from here on, and tell of them, and of what they came to, behind `check_key`."""
    live = Live(engine)
    replicas = _Cached(_replicas)

    async def read(request: Request) -> Response:
        check_key(request)
        return JSONResponse(live.reading(await replicas.get(), recent()).model_dump())

    app.router.routes.append(Route(LIVE, read))
    app.add_middleware(_Meter, took=live.took)


def percentile(ordered: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of the ordered values do not exceed; None of nothing."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


class _Meter:
    """Times every answer to a POST that succeeds, to its last byte; one that is broken off is not counted."""

    def __init__(self, app: ASGIApp, took: Callable[[float], None]) -> None:
        self._app, self._took = app, took

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def timed(message: Message) -> None:
            nonlocal status
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body") and status == 200:
                self._took(time.monotonic() - began)

        await self._app(scope, receive, timed)


class _Cached:
    """The last answer of a slow question, asked again in a thread when it is old."""

    def __init__(self, ask: Callable[[], Replicas]) -> None:
        self._ask, self._lock = ask, asyncio.Lock()
        self._found, self._until = Replicas(ALONE, {}), 0.0

    async def get(self) -> Replicas:
        async with self._lock:
            if time.monotonic() >= self._until:
                self._found = await asyncio.to_thread(self._ask)
                self._until = time.monotonic() + REPLICAS_S
            return self._found


def _replicas() -> Replicas:
    """As Serve's controller counts them; one replica where the app runs without Serve."""
    serve = sys.modules.get("ray.serve")  # not imported here: a process without it is no replica
    if serve is None:
        return Replicas(ALONE, {"RUNNING": 1})
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        own = serve.get_replica_context()
    except RayServeException:
        return Replicas(ALONE, {"RUNNING": 1})
    try:
        states = serve.status().applications[own.app_name].deployments[own.deployment].replica_states
    except (RayError, RayServeException, KeyError):  # the controller restarts; the panel shows the rest
        return Replicas(own.replica_tag, {})
    return Replicas(own.replica_tag, {getattr(state, "value", str(state)): count for state, count in states.items()})

"""Idempotency keys: the same request sent twice is one generation and two deliveries of it.

The first request with a key is worked on apart from its connection, and what it answers is recorded: whole answers and
streams alike. A second one with the same key and body follows the recording, while it grows or after. Recordings live ten
minutes, in bounded memory; refusals that a retry may overcome (429, 5xx) are not kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tigerbot_serve.gateway.errors import ApiError, broken
from tigerbot_serve.gateway.redact import without_values

log = logging.getLogger(__name__)

LIVE_S = 600.0
MAX_KEY = 255
MAX_RECORDINGS = 1_000
MAX_BYTES = 32_000_000
MAX_ONE = 4_000_000

Produce = Callable[[], Awaitable[ASGIApp]]


class Recording:
    """The ASGI messages of one answer, as they come."""

    def __init__(self, body_hash: bytes, born: float) -> None:
        self.body_hash, self.born = body_hash, born
        self.size = 0
        self.task: asyncio.Task[None] | None = None
        self._messages: list[Message] = []
        self._grew = asyncio.Event()
        self._ended = False

    @property
    def running(self) -> bool:
        return not self._ended

    @property
    def worth_keeping(self) -> bool:
        status = self._messages[0]["status"] if self._messages else 500
        return status < 500 and status != 429 and self.size <= MAX_ONE

    async def record(self, message: Message) -> None:
        """The `send` of who answers."""
        self._messages.append(message)
        self.size += len(message.get("body", b""))
        self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    async def play(self, send: Send, *, again: bool) -> None:
        """All messages, from the first, to a client."""
        place = 0
        while True:
            while place < len(self._messages):
                message = self._messages[place]
                place += 1
                if again and message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], (b"idempotency-replayed", b"true")]}
                await send(message)
            if self._ended:
                return
            await self._grew.wait()

    def _wake(self) -> None:
        self._grew.set()
        self._grew = asyncio.Event()


class Replays:
    """The recordings of one replica."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[tuple[str, str], Recording] = OrderedDict()

    def answer(self, key_id: str, name: str, body_hash: bytes, produce: Produce) -> ASGIApp:
        """A response: of the recording there is, or of a new one that `produce` makes.

        Args:
            name: the Idempotency-Key header.

        Raises:
            ApiError: 400 the name is too long, 409 it belongs to another body, 429 too many are under way.
        """
        if len(name) > MAX_KEY:
            raise ApiError(400, f"Idempotency-Key wants at most {MAX_KEY} characters", code="invalid_value")
        self._forget_old()
        known = self._kept.get((key_id, name))
        if known is None:
            return _Player(self._begin((key_id, name), body_hash, produce), again=False)
        if known.body_hash != body_hash:
            message = "this Idempotency-Key was used for another request; take a new one for each"
            raise ApiError(409, message, code="idempotency_key_reused", headers={"x-should-retry": "false"})
        return _Player(known, again=True)

    def _begin(self, place: tuple[str, str], body_hash: bytes, produce: Produce) -> Recording:
        if len(self._kept) >= MAX_RECORDINGS:
            raise ApiError(
                429,
                "too many requests with an Idempotency-Key are under way",
                code="overloaded",
                headers={"retry-after": "1"},
            )
        recording = self._kept[place] = Recording(body_hash, self._clock())
        recording.task = asyncio.create_task(self._work(place, recording, produce))
        return recording

    async def _work(self, place: tuple[str, str], recording: Recording, produce: Produce) -> None:
        try:
            try:
                response = await produce()
            except ApiError as error:
                response = error.response()
            except Exception as error:
                log.error("a request with an Idempotency-Key failed: %s", without_values(error))
                response = broken().response()
            await response(_SCOPE, _never, recording.record)
        finally:
            recording.end()
            if not recording.worth_keeping and self._kept.get(place) is recording:
                del self._kept[place]

    def _forget_old(self) -> None:
        """Those past their time, then the oldest that are done, down to what memory they may have."""
        now, size = self._clock(), sum(recording.size for recording in self._kept.values())
        for place, recording in list(self._kept.items()):
            old = now - recording.born > LIVE_S
            full = size > MAX_BYTES or len(self._kept) >= MAX_RECORDINGS
            if recording.running or not (old or full):
                continue
            del self._kept[place]
            size -= recording.size


class _Player:
    def __init__(self, recording: Recording, *, again: bool) -> None:
        self._recording, self._again = recording, again

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._recording.play(send, again=self._again)


def hash_of(path: str, body: MutableMapping[str, Any]) -> bytes:
    """What makes two requests the same: where they go and what they say, however it is written."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(f"{path} {text}".encode()).digest()


_SCOPE: Scope = {"type": "http", "method": "POST", "path": "", "headers": []}


async def _never() -> Message:
    """The `receive` of a work that has no client: nobody leaves."""
    await asyncio.Event().wait()
    raise AssertionError

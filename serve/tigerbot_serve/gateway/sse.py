"""A stream of server-sent events: accepted at once, alive while the answer is held, over when the client leaves.

Heartbeats are chunks with an empty delta: comment lines break some clients, and no line has an `id:` or an `event:`.
`choices` is empty in the usage chunk only. A stream that fails ends with an error event and without `[DONE]`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from tigerbot_serve.engine.request import Event, FinishEvent, PhaseEvent, PromptEvent, TokenEvent, Usage
from tigerbot_serve.engine.ticket import Handle
from tigerbot_serve.gateway.answers import Shape
from tigerbot_serve.gateway.decode import GRACE_S, cancel_all, failure_of
from tigerbot_serve.gateway.errors import ApiError, too_late

log = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
DONE = b"data: [DONE]\n\n"

Indexed = tuple[int, Event]


class EventStream:
    """An ASGI response that streams the answers of handles.

    Args:
        handles: one a choice; all are cancelled when the stream ends for whatever reason.
        usage: end with a usage chunk.
        write_timeout_s: a client that takes nothing for so long is left.
    """

    def __init__(
        self,
        handles: Sequence[Handle],
        shape: Shape,
        *,
        usage: bool,
        timeout_s: float,
        headers: dict[str, str],
        write_timeout_s: float = 30.0,
    ) -> None:
        self._handles, self._shape, self._usage, self._timeout_s = handles, shape, usage, timeout_s
        self._write_timeout_s = write_timeout_s
        fixed = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # proxies that gather answers would gather a stream too
        }
        self._headers = fixed | headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancel_all(self._handles)
            for task in (sending, leaving):
                if not task.done():
                    task.cancel()
            with suppress(asyncio.CancelledError, OSError):
                await sending

    async def _send(self, send: Send) -> None:
        """All of it. A client that does not read is left without an end: the server closes its connection then."""
        head = [(name.encode(), value.encode("latin-1", "replace")) for name, value in self._headers.items()]
        try:
            await self._write(send, {"type": "http.response.start", "status": 200, "headers": head})
            async for data in self._data():
                await self._write(send, {"type": "http.response.body", "body": data, "more_body": True})
            await self._write(send, {"type": "http.response.body", "body": b"", "more_body": False})
        except _NotRead:
            log.warning("a client took nothing for %g s and was left", self._write_timeout_s)

    async def _data(self) -> AsyncIterator[bytes]:
        try:
            async for chunks in self._batches():
                yield b"".join(_line(chunk) for chunk in chunks)
        except ApiError as error:
            yield _line(error.body)
        else:
            yield DONE

    async def _write(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._write_timeout_s):
                await send(message)
        except TimeoutError:
            raise _NotRead from None

    async def _batches(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Chunks that can leave together."""
        yield [self._shape.begin(index) for index in range(len(self._handles))]
        spent: dict[int, Usage] = {}
        async for events in self._events():
            chunks = list(self._chunks(events, spent)) if events else [self._shape.beat()]
            if chunks:
                yield chunks
        if self._usage:
            yield [self._shape.spent([spent[index] for index in sorted(spent)])]

    def _chunks(self, events: Sequence[Indexed], spent: dict[int, Usage]) -> Iterator[dict[str, Any]]:
        """Tokens of one choice that came together are one chunk."""
        for (index, kind), group in groupby(events, key=lambda one: (one[0], type(one[1]))):
            if kind is TokenEvent:
                tokens = [event for _, event in group if isinstance(event, TokenEvent)]
                if (chunk := self._shape.piece(index, tokens)) is not None:
                    yield chunk
                continue
            for _, event in group:
                if isinstance(event, PhaseEvent):
                    yield self._shape.beat(event.phase, index)
                elif isinstance(event, PromptEvent):
                    if (chunk := self._shape.piece(index, event.tokens)) is not None:
                        yield chunk
                elif isinstance(event, FinishEvent):
                    spent[index] = event.usage
                    yield self._shape.end(index, event)

    async def _events(self) -> AsyncIterator[list[Indexed]]:
        """Events of all choices as they come; nothing when nothing came for a while.

        Raises:
            ApiError: the deadline passed, or the engine failed.
        """
        queue: asyncio.Queue[Indexed] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(index, handle, queue)) for index, handle in enumerate(self._handles)]
        until, open_choices = time.monotonic() + self._timeout_s + GRACE_S, len(pumps)
        try:
            while open_choices:
                left = until - time.monotonic()
                if left <= 0:
                    raise too_late(self._timeout_s)
                events = await _gathered(queue, min(HEARTBEAT_S, left))
                ends = [event for _, event in events if isinstance(event, FinishEvent)]
                failure = next((found for end in ends if (found := failure_of(end, self._timeout_s))), None)
                open_choices -= len(ends)
                yield events if failure is None else [one for one in events if one[1] not in ends]
                if failure is not None:
                    raise failure
        finally:
            for pump in pumps:
                pump.cancel()


class _NotRead(Exception):
    """The client takes nothing."""


async def _gathered(queue: asyncio.Queue[Indexed], timeout_s: float) -> list[Indexed]:
    """What is there, or what comes next, or nothing after a while."""
    try:
        async with asyncio.timeout(timeout_s):
            found = [await queue.get()]
    except TimeoutError:
        return []
    while not queue.empty():
        found.append(queue.get_nowait())
    return found


async def _pump(index: int, handle: Handle, queue: asyncio.Queue[Indexed]) -> None:
    async for event in handle:
        queue.put_nowait((index, event))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _line(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()

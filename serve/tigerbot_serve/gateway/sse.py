"""A stream of server-sent events: accepted at once, alive while the answer is held, over when the client leaves.

Heartbeats are chunks with an empty delta: comment lines break some clients, and no line has an `id:`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from starlette.types import Receive, Scope, Send

from tigerbot_serve.engine.request import Event, FinishEvent, PhaseEvent, TokenEvent, Usage
from tigerbot_serve.engine.ticket import Handle
from tigerbot_serve.gateway.answers import Shape
from tigerbot_serve.gateway.decode import cancel_all
from tigerbot_serve.gateway.errors import ApiError, broken, too_late

HEARTBEAT_S = 5.0


class EventStream:
    """An ASGI response that streams the answers of handles.

    Args:
        handles: one a choice; all are cancelled when the stream ends for whatever reason.
        usage: end with a usage chunk.
    """

    def __init__(
        self, handles: Sequence[Handle], shape: Shape, *, usage: bool, timeout_s: float, headers: dict[str, str]
    ) -> None:
        self._handles, self._shape, self._usage, self._timeout_s = handles, shape, usage, timeout_s
        self._headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"} | headers

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
        head = [(name.encode(), value.encode("latin-1", "replace")) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        async for chunk in self._chunks():
            data = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        for index in range(len(self._handles)):
            yield self._shape.begin(index)
        spent: list[Usage] = []
        try:
            async for index, event in self._events():
                if event is None:
                    yield self._shape.beat()
                elif isinstance(event, PhaseEvent):
                    yield self._shape.beat(event.phase, index)
                elif isinstance(event, TokenEvent):
                    if event.text or self._shape.tokens or self._shape.logprobs:
                        yield self._shape.piece(index, [event])
                else:
                    spent.append(event.usage)
                    yield self._shape.end(index, event)
        except ApiError as error:
            yield error.body
            return
        if self._usage:
            yield self._shape.spent(spent)

    async def _events(self) -> AsyncIterator[tuple[int, Event | None]]:
        """Events of all choices as they come; None when nothing came for a while."""
        queue: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(index, handle, queue)) for index, handle in enumerate(self._handles)]
        until, open_choices = time.monotonic() + self._timeout_s, len(pumps)
        try:
            while open_choices:
                left = until - time.monotonic()
                if left <= 0:
                    raise too_late(self._timeout_s)
                try:
                    index, event = await asyncio.wait_for(queue.get(), min(HEARTBEAT_S, left))
                except TimeoutError:
                    yield 0, None
                    continue
                if isinstance(event, FinishEvent):
                    open_choices -= 1
                    if event.finish_reason == "error":
                        raise broken()
                yield index, event
        finally:
            for pump in pumps:
                pump.cancel()


async def _pump(index: int, handle: Handle, queue: asyncio.Queue[tuple[int, Event]]) -> None:
    async for event in handle:
        queue.put_nowait((index, event))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

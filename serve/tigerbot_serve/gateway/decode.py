"""The engine as the gateway sees it: requests in, handles out, whole answers in the end. Every way out frees the slots.

A client that leaves, a deadline that passes and an error all cancel what is still decoding.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from tigerbot.errors import InputError, ServeError
from tigerbot_serve.engine.request import EngineStats, FinishEvent, PromptEvent, Request, TokenEvent
from tigerbot_serve.engine.scheduler import QueueFull
from tigerbot_serve.engine.ticket import Handle
from tigerbot_serve.gateway.errors import ApiError, broken, no_memory, too_late

POLL_S = 0.05
GRACE_S = 1.0

Answer = tuple[list[TokenEvent], FinishEvent]


class Decoder(Protocol):
    """What the gateway needs of an engine."""

    tokenizer: Any
    max_length: int

    @property
    def fingerprint(self) -> str: ...

    @property
    def alive(self) -> bool: ...

    def submit(self, request: Request, loop: asyncio.AbstractEventLoop) -> Handle: ...

    def embed(self, texts: Sequence[tuple[int, ...]]) -> Future[Any]: ...

    def stats(self) -> EngineStats: ...


class ClientGone(Exception):
    """Nobody is there to be answered."""


def submit_all(engine: Decoder, requests: Sequence[Request]) -> list[Handle]:
    """Queue them all or none.

    Raises:
        ApiError: 429 the queue is full, 400 a token id is wrong, 503 the engine is down.
    """
    handles: list[Handle] = []
    try:
        for request in requests:
            handles.append(engine.submit(request, asyncio.get_running_loop()))
    except (QueueFull, InputError, ServeError) as error:
        cancel_all(handles)
        raise _refusal(error) from None
    return handles


async def whole_answers(
    handles: Sequence[Handle], disconnected: Callable[[], Any], *, timeout_s: float
) -> list[Answer]:
    """All answers to their end.

    Raises:
        ClientGone: the client left.
        ApiError: 504 after `timeout_s`; 500 when the engine failed, 503 when it had no memory.
    """
    answers = asyncio.gather(*(_drained(handle) for handle in handles))
    until = asyncio.get_running_loop().time() + timeout_s
    try:
        while not answers.done():
            # The engine keeps the deadline; this is the fence for a step that does not end.
            left = until + GRACE_S - asyncio.get_running_loop().time()
            if left <= 0:
                raise too_late(timeout_s)
            await asyncio.wait({answers}, timeout=min(POLL_S, left))
            if not answers.done() and await disconnected():
                raise ClientGone
        found = answers.result()
    finally:
        answers.cancel()
        cancel_all(handles)
    for _, end in found:
        if (failure := failure_of(end, timeout_s)) is not None:
            raise failure
    return found


def cancel_all(handles: Sequence[Handle]) -> None:
    """Free their slots; one that has finished does not mind."""
    for handle in handles:
        handle.cancel()


async def _drained(handle: Handle) -> Answer:
    tokens = []
    async for event in handle:
        if isinstance(event, TokenEvent):
            tokens.append(event)
        elif isinstance(event, PromptEvent):
            tokens += event.tokens
        elif isinstance(event, FinishEvent):
            return tokens, event
    raise broken()


def failure_of(end: FinishEvent, timeout_s: float) -> ApiError | None:
    """What a client is told of a request that did not end with its text; None where it did."""
    if end.finish_reason == "deadline":
        return too_late(timeout_s)
    if end.finish_reason == "grammar":
        message = f"the answer's grammar became too large to follow ({end.error}); simplify the schema"
        return ApiError(400, message, param="response_format", code="schema_too_complex")
    if end.finish_reason == "memory":
        return no_memory()
    return broken() if end.finish_reason == "error" else None


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, InputError):
        return ApiError(400, str(error), param="prompt", code="invalid_value")
    return ApiError(503, "the engine is not running; try again", code="engine_down", headers={"retry-after": "5"})

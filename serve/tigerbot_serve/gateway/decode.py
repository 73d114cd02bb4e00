"""From a body to engine requests, and from their handles to whole answers. Every way out frees the slots.

A client that leaves, a deadline that passes and an error all cancel what is still decoding.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Protocol

from tigerbot.chat import encode_chat, encode_plain
from tigerbot.errors import InputError, ServeError
from tigerbot.spec import ServeSpec
from tigerbot_serve.engine.request import EngineStats, FinishEvent, Request, TokenEvent
from tigerbot_serve.engine.scheduler import QueueFull
from tigerbot_serve.engine.ticket import Handle
from tigerbot_serve.gateway.errors import ApiError, broken, too_late
from tigerbot_serve.gateway.schema import ChatBody, CompletionBody, Sampling

DEFAULT_TOKENS = 256
POLL_S = 0.05

Answer = tuple[list[TokenEvent], FinishEvent]


class Decoder(Protocol):
    """What the gateway needs of an engine."""

    tokenizer: Any
    max_length: int

    @property
    def alive(self) -> bool: ...

    def submit(self, request: Request, loop: asyncio.AbstractEventLoop) -> Handle: ...

    def stats(self) -> EngineStats: ...


class ClientGone(Exception):
    """Nobody is there to be answered."""


def requests_of(body: Sampling, engine: Decoder, spec: ServeSpec) -> list[Request]:
    """The engine requests of a body, one for each of its `n` answers; `compare` asks
    three: the creative member alone, the factual member alone, and the dial that was set, all with one seed.

    Raises:
        ApiError: 404 another model, 400 the prompt does not fit, or `compare` with `n`.
    """
    if body.model != spec.model_name:
        message = f"model {body.model!r} is not served here; {spec.model_name!r} is"
        raise ApiError(404, message, param="model", code="model_not_found")
    prompt = tuple(_prompt_ids(body, engine.tokenizer, spec))
    room = engine.max_length - len(prompt)
    if not prompt or room < 1:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens; 1 to {engine.max_length - 1} fit",
            param="messages" if isinstance(body, ChatBody) else "prompt",
            code="context_length_exceeded",
        )
    seed = secrets.randbits(62) if body.seed is None else body.seed
    dial = spec.dial.default if body.creativity is None else body.creativity
    if body.compare and (body.n or 1) > 1:
        raise ApiError(400, "compare gives three answers: n wants to be 1", param="n", code="invalid_value")
    answers = (
        [(1.0, seed), (0.0, seed), (dial, seed)] if body.compare else [(dial, seed + i) for i in range(body.n or 1)]
    )
    held = isinstance(body, ChatBody) and not body.stream if body.verify is None else body.verify
    rewrites = spec.judge.max_rewrites if body.max_rewrites is None else body.max_rewrites
    return [
        Request(
            prompt_ids=prompt,
            max_tokens=min(body.limit or DEFAULT_TOKENS, room),
            dial=dial,
            temperature=body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=seed,
            stop=body.stops,
            logprobs=body.wanted_logprobs,
            verify=held,
            max_rewrites=rewrites if held else 0,
            want_tokens=bool(body.ensemble_tokens),
        )
        for dial, seed in answers
    ]


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
        ApiError: 504 after `timeout_s`; 500 when the engine failed.
    """
    answers = asyncio.gather(*(_drained(handle) for handle in handles))
    leaving = asyncio.create_task(until_gone(disconnected))
    try:
        await asyncio.wait({answers, leaving}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not answers.done():
            raise ClientGone if leaving.done() else too_late(timeout_s)
        found = answers.result()
    finally:
        leaving.cancel()
        answers.cancel()
        cancel_all(handles)
        with suppress(asyncio.CancelledError):
            await leaving
    if any(end.finish_reason == "error" for _, end in found):
        raise broken()
    return found


async def until_gone(disconnected: Callable[[], Any]) -> None:
    """Return when the client has left."""
    while not await disconnected():
        await asyncio.sleep(POLL_S)


def cancel_all(handles: Sequence[Handle]) -> None:
    """Free their slots; one that has finished does not mind."""
    for handle in handles:
        handle.cancel()


async def _drained(handle: Handle) -> Answer:
    tokens = []
    async for event in handle:
        if isinstance(event, TokenEvent):
            tokens.append(event)
        elif isinstance(event, FinishEvent):
            return tokens, event
    raise broken()


def _prompt_ids(body: Sampling, tokenizer: Any, spec: ServeSpec) -> list[int]:
    if isinstance(body, ChatBody):
        if len(body.messages) > spec.http.max_messages:
            message = f"{len(body.messages)} messages; at most {spec.http.max_messages} are taken"
            raise ApiError(400, message, param="messages", code="invalid_value")
        try:
            rows = [message.plain() for message in body.messages]
            return encode_chat(tokenizer, rows, generation_prompt=True)[0]  # type: ignore[arg-type]
        except InputError as error:
            raise ApiError(400, str(error), param="messages", code="no_chat_template") from None
    assert isinstance(body, CompletionBody)
    if isinstance(body.prompt, str):
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        return begin + encode_plain(tokenizer, body.prompt)
    return body.prompt


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, InputError):
        return ApiError(400, str(error), param="prompt", code="invalid_value")
    return ApiError(503, "the engine is not running; try again", code="engine_down", headers={"retry-after": "5"})

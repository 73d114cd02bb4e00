"""From a body to engine requests, and from their handles to whole answers. Every way out frees the slots.

A client that leaves, a deadline that passes and an error all cancel what is still decoding.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from tigerbot.chat import Message, encode_plain
from tigerbot.errors import InputError, ModelError, ServeError
from tigerbot.spec import ServeSpec
from tigerbot_serve.engine.grammar import Grammar, Grammars
from tigerbot_serve.engine.request import EngineStats, FinishEvent, PromptEvent, Request, TokenEvent
from tigerbot_serve.engine.scheduler import QueueFull
from tigerbot_serve.engine.ticket import Handle
from tigerbot_serve.gateway.checks import check_biases, check_size, prompt_field
from tigerbot_serve.gateway.errors import ApiError, broken, too_late
from tigerbot_serve.gateway.messages import encoded
from tigerbot_serve.gateway.notations import Notation
from tigerbot_serve.gateway.schema import ChatBody, CompletionBody, Sampling
from tigerbot_serve.gateway.tools import Toolbox, grammar_source, toolbox_of

DEFAULT_TOKENS = 256
POLL_S = 0.05
GRACE_S = 1.0

Answer = tuple[list[TokenEvent], FinishEvent]


class Decoder(Protocol):
    """What the gateway needs of an engine."""

    tokenizer: Any
    max_length: int
    fingerprint: str

    @property
    def alive(self) -> bool: ...

    def submit(self, request: Request, loop: asyncio.AbstractEventLoop) -> Handle: ...

    def embed(self, texts: Sequence[tuple[int, ...]]) -> Future[Any]: ...

    def stats(self) -> EngineStats: ...


class ClientGone(Exception):
    """Nobody is there to be answered."""


@dataclass(frozen=True)
class Wanted:
    """What a body comes to.

    Attributes:
        requests: one for each of the `n` answers to each prompt, prompt by prompt.
        prompts: the texts that `echo` shows, one a prompt; none where the body has no `echo`.
        begun: a token that no client sent stands before every prompt.
        calls: the answers may hold tool calls.
    """

    requests: list[Request]
    prompts: tuple[str, ...] = ()
    begun: bool = False
    calls: Notation | None = None


async def wanted_of(body: Sampling, engine: Decoder, spec: ServeSpec, grammars: Grammars, tenant: str = "") -> Wanted:
    """The engine requests of a body, asked with the key that `tenant` names.

    A new grammar is compiled in a thread: other answers go on.

    Raises:
        ApiError: 404 another model, 400 the prompt does not fit, or a field that only the engine's limits refuse.
    """
    if body.model != spec.model_name:
        message = f"model {body.model!r} is not served here; {spec.model_name!r} is"
        raise ApiError(404, message, param="model", code="model_not_found")
    check_biases(body, engine.tokenizer)
    check_size(body, engine.tokenizer, engine.max_length, spec.http.max_messages)
    toolbox = None
    if isinstance(body, ChatBody):
        toolbox = toolbox_of(body.tools, body.tool_choice, body.parallel_tool_calls, engine.tokenizer)
    prompts = _prompts(body, engine.tokenizer)
    grammar = await _grammar(body, toolbox, spec, grammars)
    requests = requests_of(body, engine, spec, prompts, grammar, toolbox=toolbox, tenant=tenant)
    if isinstance(body, CompletionBody):
        begun = isinstance(body.prompts[0], str) and engine.tokenizer.bos_token_id is not None
        return Wanted(requests, _echoed(body, engine.tokenizer), begun)
    return Wanted(requests, calls=toolbox.notation if toolbox else None)


def requests_of(
    body: Sampling,
    engine: Decoder,
    spec: ServeSpec,
    prompts: Sequence[Sequence[int]],
    grammar: Grammar | None,
    *,
    toolbox: Toolbox | None,
    tenant: str = "",
) -> list[Request]:
    """The engine requests of a body: one for each of its answers to each prompt, prompt by prompt.

    `compare` asks for three: the creative member, the factual member, and the dial that was set, with one seed.

    Raises:
        ApiError: 400 a prompt does not fit.
    """
    rooms = [_room(prompt, body, engine) for prompt in prompts]
    seed = secrets.randbits(62) if body.seed is None else body.seed
    dial = spec.dial.default if body.creativity is None else body.creativity
    if body.compare and (body.n or 1) > 1:
        raise ApiError(400, "compare gives three answers: n wants to be 1", param="n", code="invalid_value")
    compared = [(1.0, seed), (0.0, seed), (dial, seed)]
    answers = compared if body.compare else [(dial, seed + index) for index in range(body.each)]
    plugins = _plugins(body, spec)
    held = (isinstance(body, ChatBody) and not body.stream) or bool(plugins) if body.verify is None else body.verify
    rewrites = spec.judge.max_rewrites if body.max_rewrites is None else body.max_rewrites
    limit = DEFAULT_TOKENS if body.limit is None else body.limit
    shows_prompt = isinstance(body, CompletionBody) and body.echo
    return [
        Request(
            prompt_ids=tuple(prompt),
            max_tokens=min(limit, room),
            dial=dial,
            temperature=body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=seed,
            stop=body.stops,
            logprobs=body.wanted_logprobs,
            verify=held,
            max_rewrites=rewrites if held else 0,
            want_tokens=bool(body.ensemble_tokens),
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=body.repetition_penalty or 1.0,
            logit_bias=body.biases,
            grammar=grammar,
            unjudged=toolbox.notation.unjudged if toolbox else "",
            shown=tuple(toolbox.special.values()) if toolbox else (),
            prompt_logprobs=body.wanted_logprobs if shows_prompt else None,
            deadline_s=spec.http.request_timeout_s,
            tenant=tenant,
            messages=tuple(_turns(body)) if held else (),
            plugins=plugins,
            want_evidence=bool(body.evidence),
        )
        for prompt, room in zip(prompts, rooms, strict=True)
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
    return broken() if end.finish_reason == "error" else None


async def _grammar(body: Sampling, toolbox: Toolbox | None, spec: ServeSpec, grammars: Grammars) -> Grammar | None:
    found = grammar_source(body.response_format, toolbox, spec.grammar)
    if found is None:
        return None
    source, param = found
    try:
        return grammars.known(source) or await asyncio.to_thread(grammars.compile, source)
    except InputError as error:
        message = f"{param}: the schema cannot be followed: {error.what}"
        raise ApiError(400, message, param=param, code="invalid_schema") from None


def _room(prompt: Sequence[int], body: Sampling, engine: Decoder) -> int:
    room = engine.max_length - len(prompt)
    if not prompt or room < 1:
        raise ApiError(
            400,
            f"the prompt has {len(prompt)} tokens; 1 to {engine.max_length - 1} fit",
            param=prompt_field(body),
            code="context_length_exceeded",
        )
    return room


def _prompts(body: Sampling, tokenizer: Any) -> list[list[int]]:
    if isinstance(body, ChatBody):
        return [_chat_ids(body, tokenizer)]
    assert isinstance(body, CompletionBody)
    if body.limit == 0 and not body.echo:
        raise ApiError(400, "max_tokens: wants to be at least 1, or echo", param="max_tokens", code="invalid_value")
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return [begin + encode_plain(tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]


def _chat_ids(body: ChatBody, tokenizer: Any) -> list[int]:
    shown = [] if body.tool_choice == "none" else [tool.shown() for tool in body.tools or ()]
    try:
        return encoded(tokenizer, body.messages, shown)
    except ModelError as error:
        raise ApiError(400, str(error), param="messages", code="no_chat_template") from None
    except InputError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from None


def _echoed(body: CompletionBody, tokenizer: Any) -> tuple[str, ...]:
    if not body.echo:
        return ()
    return tuple(
        prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=True)
        for prompt in body.prompts
    )


def _turns(body: Sampling) -> list[Message]:
    """The conversation as a rewrite begins from it. A plain completion is one turn to search with, never to template."""
    return [message.plain() for message in body.messages] if isinstance(body, ChatBody) else []  # type: ignore[misc]


def _plugins(body: Sampling, spec: ServeSpec) -> tuple[str, ...]:
    """The plug-ins a body names, of those the spec has.

    Raises:
        ApiError: 400, there is none of that name.
    """
    served = [plugin.name for plugin in spec.plugins]
    for name in body.plugins or ():
        if name not in served:
            message = f"plugins: got {name!r}, this server has {', '.join(served) or 'none'}"
            raise ApiError(400, message, param="plugins", code="unknown_plugin")
    return tuple(dict.fromkeys(body.plugins or ()))


def _refusal(error: Exception) -> ApiError:
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, InputError):
        return ApiError(400, str(error), param="prompt", code="invalid_value")
    return ApiError(503, "the engine is not running; try again", code="engine_down", headers={"retry-after": "5"})

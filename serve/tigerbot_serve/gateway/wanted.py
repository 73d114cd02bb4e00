"""From a body to engine requests. What a body alone does not tell, the prompt's length say, is checked here."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tigerbot.chat import Message, encode_plain
from tigerbot.errors import InputError, ModelError
from tigerbot.spec import ServeSpec
from tigerbot_serve.engine.grammar import Grammar, Grammars
from tigerbot_serve.engine.request import Request
from tigerbot_serve.gateway.checks import check_biases, check_size, prompt_field
from tigerbot_serve.gateway.decode import Decoder
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.messages import encoded
from tigerbot_serve.gateway.notations import Notation
from tigerbot_serve.gateway.schema import ChatBody, CompletionBody, Sampling
from tigerbot_serve.gateway.tools import Toolbox, grammar_source, toolbox_of

DEFAULT_TOKENS = 256


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

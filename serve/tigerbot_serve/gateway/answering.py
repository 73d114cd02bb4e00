"""The routes that decode: who asks, may they, the tokens reserved, the answer whole or streamed, the tokens settled.

Everything that can refuse a request stands before the engine hears of it; every way out of it settles what was reserved.
A request with an Idempotency-Key is worked on apart from its connection.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from tigerbot.spec import ServeSpec
from tigerbot_serve.engine.grammar import Grammars
from tigerbot_serve.engine.request import Summary
from tigerbot_serve.gateway.admission import Admission
from tigerbot_serve.gateway.answers import Shape
from tigerbot_serve.gateway.body import read_object
from tigerbot_serve.gateway.decode import Decoder, submit_all, whole_answers
from tigerbot_serve.gateway.edge import visit_of
from tigerbot_serve.gateway.embeddings import EmbeddingBody, embed, texts_of
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.gateway.ledger import Tokens
from tigerbot_serve.gateway.limits import Limiter
from tigerbot_serve.gateway.replays import Replays, hash_of
from tigerbot_serve.gateway.schema import ChatBody, CompletionBody, Sampling, parse
from tigerbot_serve.gateway.sse import EventStream
from tigerbot_serve.gateway.visit import Visit
from tigerbot_serve.gateway.wanted import wanted_of
from tigerbot_serve.gateway.work import Settled, Work
from tigerbot_serve.scale.canary import name_caller


class Answering:
    """`POST /v1/chat/completions` and `/v1/completions`.

    Args:
        pseudonym: what stands for a user's name in the audit log.
    """

    def __init__(
        self,
        engine: Decoder,
        spec: ServeSpec,
        keys: KeyRing,
        limiter: Limiter,
        admission: Admission,
        pseudonym: Callable[[str], str],
    ) -> None:
        self._engine, self._spec, self._keys = engine, spec, keys
        self._limiter, self._admission, self._pseudonym = limiter, admission, pseudonym
        self._replays = Replays()
        self._grammars = Grammars(engine.tokenizer, spec.grammar)

    async def chat(self, request: Request) -> Any:
        return await self._answer(request, ChatBody, "chatcmpl")

    async def completions(self, request: Request) -> Any:
        return await self._answer(request, CompletionBody, "cmpl")

    async def embeddings(self, request: Request) -> ASGIApp:
        visit = visit_of(request.scope)
        key = visit.key = self._keys.check(request.headers.get("authorization"), "embeddings")
        visit.traceparent = request.headers.get("traceparent", "")
        body, ignored = parse(EmbeddingBody, await self._object(request))
        texts = await texts_of(body, self._engine, self._spec)
        read = sum(map(len, texts))
        visit.user = self._pseudonym(body.user or key.user)
        work = await self._held(visit, Tokens(prompt=read), read)
        try:
            found = await embed(texts, body, self._engine, self._spec, request.is_disconnected)
            visit.tokens = Tokens(prompt=read)
        finally:
            work.end()
        return JSONResponse(found, headers=_ignored(ignored))

    async def _object(self, request: Request) -> dict[str, Any]:
        http, timeout_s = self._spec.http, self._spec.slow_clients.body_timeout_s
        return await read_object(request, http.max_body_bytes, max_messages=http.max_messages, timeout_s=timeout_s)

    async def _answer(self, request: Request, kind: type[Sampling], prefix: str) -> ASGIApp:
        visit, headers = visit_of(request.scope), request.headers
        key = visit.key = self._keys.check(headers.get("authorization"), "chat")
        visit.traceparent = headers.get("traceparent", "")
        raw = await self._object(request)
        name = headers.get("idempotency-key")
        if name is None:
            return await self._fresh(visit, raw, kind, prefix, request.is_disconnected)

        async def produce() -> ASGIApp:
            try:
                return await self._fresh(visit, raw, kind, prefix, _stays)
            except ApiError as error:
                visit.code = error.code or ""
                raise

        return self._replays.answer(key.id, name, hash_of(request.url.path, raw), produce)

    async def _fresh(
        self, visit: Visit, raw: dict[str, Any], kind: type[Sampling], prefix: str, disconnected: Callable[[], Any]
    ) -> ASGIApp:
        body, ignored = parse(kind, raw)
        name_caller(body.user)
        assert visit.key is not None
        wanted = await wanted_of(body, self._engine, self._spec, self._grammars, visit.key.id)
        work = await self._reserved(visit, body, wanted.requests)
        try:
            handles = work.watch(submit_all(self._engine, wanted.requests))
            self._admission.took(work.outstanding)
            visit.mark("admitted")
            shape = TimedShape(
                id=f"{prefix}-{secrets.token_hex(12)}",
                model=self._spec.model_name,
                tokenizer=self._engine.tokenizer,
                chat=kind is ChatBody,
                logprobs=body.wanted_logprobs is not None,
                tokens=bool(body.ensemble_tokens),
                fingerprint=self._engine.fingerprint,
                each=body.each,
                prompts=wanted.prompts,
                begun=wanted.begun,
                calls=wanted.calls,
                evidence=bool(body.evidence),
                visit=visit if body.timeline else None,
            )
            headers = _ignored(ignored)
            timeout_s = self._spec.http.request_timeout_s
            if body.stream:
                usage = bool(body.stream_options and body.stream_options.include_usage)
                stream = EventStream(
                    handles,
                    shape,
                    usage=usage,
                    timeout_s=timeout_s,
                    headers=headers,
                    write_timeout_s=self._spec.slow_clients.write_timeout_s,
                )
                return Settled(stream, work)
            answers = await whole_answers(handles, disconnected, timeout_s=timeout_s)
        except BaseException:
            work.end()
            raise
        work.end()
        return JSONResponse(shape.whole(answers), headers=headers)

    async def _reserved(self, visit: Visit, body: Sampling, wanted: list[Any]) -> Work:
        """Take the tokens that a request may use from its key's limits, if the engine has room for it at all."""
        key = visit.key
        assert key is not None
        visit.user = self._pseudonym(body.user or key.user)
        visit.judged, visit.each = wanted[0].verify, body.each
        asked = sum(request.max_tokens for request in wanted)
        read = sum(len(request.prompt_ids) for request in wanted)
        return await self._held(visit, Tokens(prompt=read // visit.each, completion=asked), read + asked)

    async def _held(self, visit: Visit, tokens: Tokens, outstanding: int) -> Work:
        key = visit.key
        assert key is not None
        self._admission.check(outstanding)
        await self._limiter.ready(key, tokens)
        return Work(visit, self._limiter, self._limiter.reserve(key, tokens), tokens, outstanding)


@dataclass(frozen=True)
class TimedShape(Shape):
    """A shape whose `ensemble` object has the visit's timeline, where one is given."""

    visit: Visit | None = None

    def ensemble(self, summary: Summary) -> dict[str, Any]:
        found = super().ensemble(summary)
        return found | {"timeline": self.visit.timeline()} if self.visit else found


async def _stays() -> bool:
    """A work of its own has no client that could leave."""
    await asyncio.sleep(0)
    return False


def _ignored(names: list[str]) -> dict[str, str]:
    """The header that names a body's unknown fields."""
    safe = ", ".join(re.sub(r"[^\x21-\x7e]", "?", name)[:64] for name in names[:32])
    return {"x-ignored-fields": safe} if names else {}

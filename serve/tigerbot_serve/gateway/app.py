"""The OpenAI-compatible surface over an engine, and the chat page. ASGI, so it runs under Ray Serve or uvicorn alike."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tigerbot.spec import ServeSpec
from tigerbot_serve.gateway.answers import Shape
from tigerbot_serve.gateway.body import read_object
from tigerbot_serve.gateway.decode import ClientGone, Decoder, requests_of, submit_all, whole_answers
from tigerbot_serve.gateway.errors import ApiError, broken
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.gateway.live import add_live
from tigerbot_serve.gateway.pages import add_pages
from tigerbot_serve.gateway.schema import ChatBody, CompletionBody, Sampling, parse
from tigerbot_serve.gateway.sse import EventStream

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def create_app(engine: Decoder, spec: ServeSpec, keys: KeyRing) -> Starlette:
    """The application of one replica.

    Args:
        engine: started; it is not stopped here.
        keys: an empty ring lets everybody in.
    """
    gateway = _Gateway(engine, spec, keys)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", gateway.chat, methods=["POST"]),
            Route("/v1/completions", gateway.completions, methods=["POST"]),
            Route("/v1/models", gateway.models),
            Route("/v1/models/{name}", gateway.model),
            Route("/healthz", gateway.health),
            Route("/metrics", gateway.metrics),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, ClientGone: _gone, Exception: _bug},
    )
    add_pages(app, spec.model_name)
    add_live(app, engine, gateway._check_key)
    app.add_middleware(_Edge, hosts=LOOPBACK if spec.http.host in LOOPBACK else ())
    app.state.engine = engine
    return app


class _Gateway:
    def __init__(self, engine: Decoder, spec: ServeSpec, keys: KeyRing) -> None:
        self._engine, self._spec, self._keys = engine, spec, keys
        self._began = int(time.time())

    async def chat(self, request: HttpRequest) -> Any:
        return await self._answer(request, ChatBody, "chatcmpl")

    async def completions(self, request: HttpRequest) -> Any:
        return await self._answer(request, CompletionBody, "cmpl")

    async def _answer(self, request: HttpRequest, kind: type[Sampling], prefix: str) -> Any:
        self._check_key(request)
        body, ignored = parse(kind, await read_object(request, self._spec.http.max_body_bytes))
        wanted = requests_of(body, self._engine, self._spec)
        shape = Shape(
            id=f"{prefix}-{secrets.token_hex(12)}",
            model=self._spec.model_name,
            tokenizer=self._engine.tokenizer,
            chat=kind is ChatBody,
            logprobs=body.wanted_logprobs is not None,
            tokens=bool(body.ensemble_tokens),
        )
        headers = {"x-ignored-fields": _header_safe(ignored)} if ignored else {}
        timeout_s = self._spec.http.request_timeout_s
        handles = submit_all(self._engine, wanted)
        if body.stream:
            usage = bool(body.stream_options and body.stream_options.include_usage)
            return EventStream(handles, shape, usage=usage, timeout_s=timeout_s, headers=headers)
        answers = await whole_answers(handles, request.is_disconnected, timeout_s=timeout_s)
        return JSONResponse(shape.whole(answers), headers=headers)

    async def models(self, request: HttpRequest) -> Response:
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: HttpRequest) -> Response:
        self._check_key(request)
        if request.path_params["name"] != self._spec.model_name:
            raise ApiError(404, "no such model is served here", param="model", code="model_not_found")
        return JSONResponse(self._card())

    async def health(self, request: HttpRequest) -> Response:
        return JSONResponse(
            {"status": "ok" if self._engine.alive else "engine down"}, 200 if self._engine.alive else 503
        )

    async def metrics(self, request: HttpRequest) -> Response:
        self._check_key(request)
        stats = vars(self._engine.stats())
        return PlainTextResponse("".join(f"tiger_{name} {value}\n" for name, value in stats.items()))

    def _check_key(self, request: HttpRequest) -> None:
        self._keys.check(request.headers.get("authorization"))

    def _card(self) -> dict[str, Any]:
        return {"id": self._spec.model_name, "object": "model", "created": self._began, "owned_by": "tigerbot"}


class _Edge:
    """Every answer has an id; on loopback only names of this machine are served (a foreign name that resolves here is
    how a web page reaches a local server: DNS rebinding)."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(8).encode()

        async def tagged(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        host = _host_of(scope)
        if self._hosts and host not in self._hosts:
            refusal = ApiError(421, f"this server answers to {', '.join(self._hosts)} only", code="wrong_host")
            await refusal.response()(scope, receive, tagged)
            return
        await self._app(scope, receive, tagged)


def _host_of(scope: Scope) -> str:
    named = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    return re.sub(r":\d+$", "", named).strip("[]").lower()


def _header_safe(names: list[str]) -> str:
    return ", ".join(re.sub(r"[^\x21-\x7e]", "?", name)[:64] for name in names[:32])


Handler = Callable[[HttpRequest, Exception], Awaitable[Response]]


async def _api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not for {request.url.path}"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, known.get(error.status_code, error.detail), code=code).response()


async def _gone(request: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _bug(request: HttpRequest, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return broken().response()

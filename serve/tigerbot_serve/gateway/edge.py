"""The outermost ring of the gateway: every request gets an id and a visit, every answer its headers, no bug a traceback.

On loopback only names of this machine are served: a foreign name that resolves here is how a web page reaches a local
server (DNS rebinding). What is logged about a bug is where it happened, never its values: they may be a prompt.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Callable, Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tigerbot_serve.gateway.errors import ApiError, broken
from tigerbot_serve.gateway.limits import Limiter
from tigerbot_serve.gateway.redact import without_values
from tigerbot_serve.gateway.visit import Visit

log = logging.getLogger(__name__)

VISIT = "tiger.visit"


class Edge:
    """ASGI middleware.

    Args:
        hosts: the names this server answers to; none given takes any.
        routes: paths of the routes, `{...}` standing for one part of a path.
        told: gets every visit when it has ended.
    """

    def __init__(
        self,
        app: ASGIApp,
        hosts: tuple[str, ...],
        routes: Iterable[str],
        limiter: Limiter,
        told: Callable[[Visit], None],
    ) -> None:
        self._app, self._hosts, self._limiter, self._told = app, hosts, limiter, told
        paths = tuple(routes)
        self._plain = {path: path for path in paths if "{" not in path}
        self._patterns = [(re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), path) for path in paths if "{" in path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = Visit(secrets.token_hex(8), self._route_of(scope["path"]), self._told)
        visit.enter()
        scope[VISIT] = visit
        started = complete = False
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal started, complete, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                message["headers"] = [*message.get("headers", ()), *self._headers(visit)]
            elif not message.get("more_body"):
                complete = True
                visit.mark("answered")
            await send(message)

        try:
            if self._hosts and _host_of(scope) not in self._hosts:
                await _wrong_host(self._hosts).response()(scope, receive, tagged)
            else:
                await self._app(scope, receive, tagged)
        except Exception as error:
            log.error("request %s failed: %s", visit.request_id, without_values(error))
            if not started:
                visit.code = "server_error"
                await broken().response()(scope, receive, tagged)
        finally:
            if complete:
                visit.status = status
            visit.leave()

    def _headers(self, visit: Visit) -> list[tuple[bytes, bytes]]:
        found = [(b"x-request-id", visit.request_id.encode())]
        if visit.key is not None:
            found += self._limiter.headers(visit.key)
        return found

    def _route_of(self, path: str) -> str:
        known = self._plain.get(path)
        if known is not None:
            return known
        return next((name for pattern, name in self._patterns if pattern.fullmatch(path)), "other")


def visit_of(scope: Scope) -> Visit:
    """The visit that a request belongs to."""
    return scope[VISIT]


def _wrong_host(hosts: tuple[str, ...]) -> ApiError:
    return ApiError(421, f"this server answers to {', '.join(hosts)} only", code="wrong_host")


def _host_of(scope: Scope) -> str:
    named = next((value for name, value in scope["headers"] if name == b"host"), b"")
    name, _, port = named.rpartition(b":")
    bare = name if port.isdigit() and (b":" not in name or name.endswith(b"]")) else named
    return bare.strip(b"[]").lower().decode("latin-1")

"""At the proxy: what Serve itself answers when a replica goes away is made an error that clients retry.

Serve's proxy then says nothing at all (its server makes that a 500), or 500 with a line of text, or of a traceback.
Nothing of an answer has left, so it is safe to ask again: 503 with `retry-after`, in OpenAI's shape. What a replica
answered passes untouched.
"""

from __future__ import annotations

import json
import logging
import secrets

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tigerbot_serve.deploy.patience import be_impatient

log = logging.getLogger(__name__)

Headers = list[tuple[bytes, bytes]]

ANSWERED = b"x-tiger-replica"  # stands in every answer of a replica
_LOST = {
    "error": {
        "message": "the replica that worked on this went away; ask again",
        "type": "server_error",
        "param": None,
        "code": "replica_lost",
    }
}
_BODY = json.dumps(_LOST).encode()
_HEADERS: Headers = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(_BODY)).encode()),
    (b"retry-after", b"1"),
]


def lost_page() -> bytes:
    """The same as a whole HTTP/1.1 answer, for a proxy that takes it from a file."""
    lines = [b"HTTP/1.1 503 Service Unavailable", *(b": ".join(header) for header in _HEADERS), b"", _BODY]
    return b"\r\n".join(lines)


def middlewares() -> list[Middleware]:
    """Named to Ray Serve in an environment variable: every process that will listen asks for it before it does."""
    be_impatient()
    return [Middleware(Lost)]  # type: ignore[arg-type]


class Lost:
    """Turns an error that no replica made into 503."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = lost = False

        async def say_so(kept: Headers) -> None:
            await send({"type": "http.response.start", "status": 503, "headers": [*kept, *_HEADERS]})
            await send({"type": "http.response.body", "body": _BODY})

        async def checked(message: Message) -> None:
            nonlocal begun, lost
            if message["type"] == "http.response.start":
                begun, lost = True, message["status"] in (500, 503) and not _answered(message)
                if lost:
                    await say_so([(k, v) for k, v in message.get("headers", []) if k.lower() == b"x-request-id"])
                    return
            if not lost:
                await send(message)

        try:
            await self._app(scope, receive, checked)
        except Exception:
            if begun:  # half an answer has left: the broken connection says so
                raise
            log.exception("the proxy failed")
        if not begun:
            await say_so([])


class Answered:
    """In a replica: marks its answers with a name of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._name = secrets.token_hex(4).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (ANSWERED, self._name)]
            await send(message)

        await self._app(scope, receive, marked)


def _answered(message: Message) -> bool:
    return any(name.lower() == ANSWERED for name, _ in message.get("headers", []))

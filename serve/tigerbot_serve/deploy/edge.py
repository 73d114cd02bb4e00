"""At the proxy: what Serve itself answers when a replica goes away is made an error that clients retry.

Serve's proxy says 500 with a line of text, or of a traceback. Nothing of an answer has left then, so it is safe to ask
again: 503 with `retry-after`, in OpenAI's shape. What a replica answered passes untouched.
"""

from __future__ import annotations

import json
import secrets

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tigerbot_serve.deploy.patience import be_impatient

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
_HEADERS = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(_BODY)).encode()),
    (b"retry-after", b"1"),
]


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
        lost = False

        async def checked(message: Message) -> None:
            nonlocal lost
            if message["type"] == "http.response.start":
                lost = message["status"] in (500, 503) and not _answered(message)
                if lost:
                    kept = [(k, v) for k, v in message.get("headers", []) if k.lower() == b"x-request-id"]
                    await send({"type": "http.response.start", "status": 503, "headers": [*kept, *_HEADERS]})
                    await send({"type": "http.response.body", "body": _BODY})
                    return
            if not lost:
                await send(message)

        await self._app(scope, receive, checked)


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

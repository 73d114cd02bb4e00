"""The chat page's files: index.html at `/`, the rest under `/static/`. Read once, served under a strict policy.

Nothing inline runs and nothing is loaded from elsewhere, so that a text which became markup by mistake would do
nothing. Files are found by their exact name, never by a path that a client sends.
"""

from __future__ import annotations

import hashlib
import html
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tigerbot_serve.gateway.errors import ApiError

FOLDER = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".json": "application/json"}
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # kept by the browser, asked for by its tag: a new version is seen at once
}


@dataclass(frozen=True)
class File:
    """Its bytes, its type, and a tag that changes with its bytes."""

    data: bytes
    media_type: str
    tag: str


def add_pages(app: Starlette, model_name: str) -> None:
    """Serve the page and its files; the page is told the model's name."""
    files = {path.name: _file(path.read_bytes(), path.suffix) for path in FOLDER.iterdir() if path.suffix in TYPES}
    page = files.pop("index.html")
    name = f'<meta name="model" content="{html.escape(model_name)}">\n<title>'
    index = _file(page.data.replace(b"<title>", name.encode(), 1), ".html")

    async def root(request: Request) -> Response:
        return _answer(request, index)

    async def static(request: Request) -> Response:
        file = files.get(request.path_params["name"])
        if file is None:
            raise ApiError(404, "there is no such file of the page", code="not_found")
        return _answer(request, file)

    app.router.routes += [Route("/", root), Route("/static/{name}", static)]


def _file(data: bytes, suffix: str) -> File:
    return File(data, f"{TYPES[suffix]}; charset=utf-8", f'"{hashlib.sha256(data).hexdigest()[:16]}"')


def _answer(request: Request, file: File) -> Response:
    headers = HEADERS | {"etag": file.tag}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)

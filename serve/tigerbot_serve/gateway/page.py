"""The chat page: one file with its own script, and a policy under which nothing else runs."""

from __future__ import annotations

import base64
import hashlib
import html
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

PAGE = Path(__file__).parent / "static" / "index.html"


class Page:
    """`GET /`."""

    def __init__(self, model_name: str) -> None:
        name = f'<meta name="model" content="{html.escape(model_name)}">'
        self._text = PAGE.read_text(encoding="utf-8").replace("<title>", f"{name}\n<title>", 1)
        self._headers = {
            "content-security-policy": policy(self._text),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
        }

    async def show(self, request: Request) -> Response:
        return HTMLResponse(self._text, headers=self._headers)


def policy(page: str) -> str:
    """A content security policy that runs this page's own script and nothing else."""
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

"""The routes that tell: which models are served, whether the engine lives, what Prometheus wants to know."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tigerbot.spec import ServeSpec
from tigerbot_serve.gateway.decode import Decoder
from tigerbot_serve.gateway.edge import visit_of
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.gateway.metrics import CONTENT_TYPE, Metrics

_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")


class About:
    """`/v1/models`, `/v1/models/{name}`, `/healthz`, `/metrics`.

    Args:
        local: the server is bound to loopback: whoever asks without a proxy between is on this machine.
    """

    def __init__(self, engine: Decoder, spec: ServeSpec, keys: KeyRing, metrics: Metrics, *, local: bool) -> None:
        self._engine, self._spec, self._keys = engine, spec, keys
        self._metrics, self._local = metrics, local
        self._began = int(time.time())

    async def models(self, request: Request) -> Response:
        self.let_in(request)
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        self.let_in(request)
        if request.path_params["name"] != self._spec.model_name:
            raise ApiError(404, "no such model is served here", param="model", code="model_not_found")
        return JSONResponse(self._card())

    async def health(self, request: Request) -> Response:
        alive = self._engine.alive
        return JSONResponse({"status": "ok" if alive else "engine down"}, 200 if alive else 503)

    async def metrics(self, request: Request) -> Response:
        if not self._local or any(name in request.headers for name in _FORWARDED):
            self.let_in(request, "admin")
        return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

    def let_in(self, request: Request, scope: str | None = None) -> None:
        """Raises: ApiError: 401 without a key, 403 without the scope."""
        visit_of(request.scope).key = self._keys.check(request.headers.get("authorization"), scope)

    def _card(self) -> dict[str, Any]:
        return {"id": self._spec.model_name, "object": "model", "created": self._began, "owned_by": "tigerbot"}

"""The OpenAI-compatible surface over an engine, and the chat page. ASGI, so it runs under Ray Serve or uvicorn alike.

This file wires the parts together: routes, who is let in, what is counted when a request has ended.
"""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tigerbot.spec import ServeSpec
from tigerbot_serve.gateway import openapi
from tigerbot_serve.gateway.about import About
from tigerbot_serve.gateway.admission import Admission, budget_of
from tigerbot_serve.gateway.answering import Answering
from tigerbot_serve.gateway.audit import Audit
from tigerbot_serve.gateway.decode import ClientGone, Decoder
from tigerbot_serve.gateway.edge import Edge, visit_of
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.gateway.ledger import Ledger
from tigerbot_serve.gateway.limits import Limiter
from tigerbot_serve.gateway.live import LIVE, add_live
from tigerbot_serve.gateway.metrics import Metrics
from tigerbot_serve.gateway.pages import add_pages
from tigerbot_serve.gateway.traces import traces_of
from tigerbot_serve.gateway.visit import Visit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BUDGETS = "budgets.json"


def create_app(
    engine: Decoder,
    spec: ServeSpec,
    keys: KeyRing,
    *,
    folder: Path | None = None,
    limiter: Limiter | None = None,
) -> Starlette:
    """The application of one replica. Its end, or `app.state.close()`, writes down what is still in memory.

    Args:
        engine: started; it is not stopped here.
        keys: an empty ring lets everybody in.
        folder: the run's, for the audit log, traces and what was spent; without it they are not kept.
        limiter: what several replicas share; left out, this process counts alone.
    """
    local = spec.http.host in LOOPBACK
    limiter = limiter or Limiter(spec.access, Ledger(folder / BUDGETS if folder else None))
    audit, traces = Audit(spec.access.audit, folder), traces_of(spec, folder)
    metrics = Metrics(engine.stats, lambda: audit.dropped)
    admission = Admission(engine.stats, budget_of(spec, engine.max_length))
    answering = Answering(engine, spec, keys, limiter, admission, audit.pseudonym)
    about = About(engine, spec, keys, metrics, local=local)

    def told(visit: Visit) -> None:
        metrics.count(visit)
        if visit.route != LIVE:  # an open page asks every two seconds
            audit.write(visit)
        if traces is not None:
            traces.tell(visit)

    def close() -> None:
        for part in (limiter, audit, traces):
            if part is not None:
                part.close()

    routes = [
        Route("/v1/chat/completions", answering.chat, methods=["POST"]),
        Route("/v1/completions", answering.completions, methods=["POST"]),
        Route("/v1/embeddings", answering.embeddings, methods=["POST"]),
        Route("/v1/models", about.models),
        Route("/v1/models/{name}", about.model),
        Route("/openapi.json", openapi.serve),
        Route("/healthz", about.health),
        Route("/metrics", about.metrics),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # What is there now stays: searching models and libraries for garbage again and again is a third of the work.
        gc.collect()
        gc.freeze()
        yield
        close()

    app = Starlette(
        routes=routes,
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, ClientGone: _gone},
        lifespan=lifespan,
    )
    add_pages(app, spec.model_name)
    add_live(app, engine, about.let_in, metrics.recent)
    paths = [route.path for route in app.routes if isinstance(route, Route)]
    app.add_middleware(Edge, hosts=LOOPBACK if local else (), routes=paths, limiter=limiter, told=told)
    app.state.engine, app.state.close = engine, close
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    visit_of(request.scope).code = error.code or ""
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: f"there is no {request.url.path} here", 405: f"{request.method} is not for {request.url.path}"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, known.get(error.status_code, error.detail), code=code).response()


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it

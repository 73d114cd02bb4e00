"""The gateway over a real engine, served by uvicorn on a real socket."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from no_cost import NoCost

from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.gateway.app import create_app
from tigerbot_serve.gateway.keys import KeyRing


@dataclass(frozen=True)
class Served:
    url: str
    engine: Engine

    def settle(self) -> None:
        """Wait until no request holds a slot."""
        until = time.monotonic() + 10
        while self.engine.stats().slots_used or self.engine.stats().queued:
            assert time.monotonic() < until, "a slot leaked"
            time.sleep(0.01)


@pytest.fixture
def serve_app() -> Iterator[Callable[[Any], str]]:
    """`serve_app(app)`: an ASGI app under uvicorn on a port of its own; returns its address."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: Any) -> str:
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        until = time.monotonic() + 10
        while not server.started:
            assert time.monotonic() < until
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in servers:
        server.should_exit = True
        thread.join(timeout=10)


@pytest.fixture
def serve_engine(engine_of: Callable[..., Engine], serve_app: Callable[[Any], str]) -> Callable[..., Served]:
    """`serve_engine(heads=..., http={...})`: the LoRA ensemble of the test world, on a port of its own."""

    def start(*, keys: KeyRing | None = None, **fields: Any) -> Served:
        engine = engine_of("lora", **fields)
        served = Served(serve_app(create_app(engine, spec_of(**fields), keys or KeyRing())), engine)
        assert httpx.get(f"{served.url}/healthz").status_code == 200
        return served

    return start


def spec_of(**fields: Any) -> ServeSpec:
    spec = parse_spec({"kind": "serve", "name": "s", "members": {"creative": "x"}} | fields)
    assert isinstance(spec, ServeSpec)
    return spec


@dataclass(frozen=True)
class Free:
    """A gateway over a decoder of no cost. `folder` is where it keeps its logs, `close` writes them."""

    url: str
    decoder: NoCost
    folder: Path
    close: Callable[[], None]


@pytest.fixture
def serve_free(tokenizer: Any, serve_app: Callable[[Any], str], tmp_path: Path) -> Iterator[Callable[..., Free]]:
    """`serve_free(keys=..., hold=True, access={...})`."""
    begun: list[Free] = []

    def start(*, keys: KeyRing | None = None, hold: bool = False, **fields: Any) -> Free:
        decoder = NoCost(tokenizer, hold=hold)
        app = create_app(decoder, spec_of(**fields), keys or KeyRing(), folder=tmp_path / "run")
        begun.append(Free(serve_app(app), decoder, tmp_path / "run", app.state.close))
        return begun[-1]

    yield start
    for free in begun:
        free.decoder.release()
        free.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the module's own: playwright's loop must not outlive it."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that remembers its `problems`: errors of scripts and what the policy refused."""
    context = browser.new_context(viewport={"width": 900, "height": 900}, locale="en-US")
    context.set_default_timeout(90_000)  # a loaded machine is slow, not broken
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
    yield page
    context.close()

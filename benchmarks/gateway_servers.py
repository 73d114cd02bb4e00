"""The servers that `benchmarks/gateway.py` measures, each a process of its own: `python -m benchmarks.gateway_servers`.

plain PORT              an ASGI app that answers a constant: what uvicorn itself costs
ours PORT               our gateway, keys, limits and checks on, over a decoder that answers at once
serve PORT              the same behind Ray Serve, with whatever ingress the environment asks for
engine PORT FOLDER      our gateway over a real engine of the models in FOLDER
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tigerbot.models import load_tokenizer
from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_jobs.data.tokenizer import train_tokenizer
from tigerbot_serve.engine.request import EngineStats, FinishEvent, Request, Summary, TokenEvent, Usage
from tigerbot_serve.engine.ticket import Handle
from tigerbot_serve.gateway.app import create_app
from tigerbot_serve.gateway.keys import KeyRing

KEY = "sk-benchmark"
TOKENS = 8


class NoCost:
    """A decoder whose model takes no time: every answer is there when it is asked for."""

    max_length = 4096
    alive = True
    fingerprint = "fp_of_no_cost"

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as name:
            train_tokenizer(["The fox sings. 狐狸唱歌。" * 5] * 50, 600, Path(name) / "tokenizer")
            self.tokenizer = load_tokenizer(Path(name) / "tokenizer")
        self._tokens = [TokenEvent(" word", 300, -1.0, (), None, None, 0.3)] * TOKENS

    def submit(self, request: Request, loop: asyncio.AbstractEventLoop) -> Handle:
        handle = Handle(loop, lambda: None)
        usage = Usage(prompt_tokens=len(request.prompt_ids), completion_tokens=TOKENS)
        summary = Summary(dial=request.dial, w_mean=0.3, p_dev_max=None, verdict="unverified")
        handle.deliver([*self._tokens, FinishEvent("stop", usage, summary)])
        return handle

    def embed(self, texts: Sequence[tuple[int, ...]]) -> Future[Any]:
        raise NotImplementedError

    def stats(self) -> EngineStats:
        numbers: dict[str, Any] = {field.name: 0 for field in dataclasses.fields(EngineStats)}
        return EngineStats(**numbers | {"slots": 64})


def serve_spec(**fields: Any) -> ServeSpec:
    spec = parse_spec({"kind": "serve", "name": "bench", "members": {"creative": "none"}} | fields)
    assert isinstance(spec, ServeSpec)
    return spec


def keys() -> KeyRing:
    return KeyRing((hashlib.sha256(KEY.encode()).digest(),))


def _plain(port: int) -> None:
    message = {"role": "assistant", "content": " word" * TOKENS}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    spent = {"prompt_tokens": 9, "completion_tokens": TOKENS, "total_tokens": 9 + TOKENS}
    answer = {"id": "chatcmpl-0", "object": "chat.completion", "created": 1, "model": "tiger"}
    data = json.dumps(answer | {"choices": [choice], "usage": spent}).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": data})

    _uvicorn(app, port)


def _ours(port: int) -> None:
    _uvicorn(create_app(NoCost(), serve_spec(), keys()), port)


def _engine(port: int, folder: str) -> None:
    from tigerbot_serve.ensemble.build import build_engine

    spec = serve_spec(**json.loads((Path(folder) / "serve.json").read_text()))
    engine = build_engine(spec)
    engine.start()
    try:
        _uvicorn(create_app(engine, spec, keys()), port)
    finally:
        engine.stop()


def _serve(port: int) -> None:
    import logging

    import ray
    from ray import serve

    from tigerbot.cluster import connect

    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cluster = connect(None, num_cpus=2)
    quiet: Any = {"log_level": "WARNING", "enable_access_log": False}

    # The class is pickled by value: the workers know where this file is, not what it was run as.
    def build() -> Any:
        from benchmarks import gateway_servers as here

        return here.create_app(here.NoCost(), here.serve_spec(http={"host": "0.0.0.0"}), here.keys())

    @serve.deployment(max_ongoing_requests=512, ray_actor_options={"num_cpus": 0.5})
    @serve.ingress(build)
    class Replica:
        pass

    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
        serve.run(Replica.bind(), name="bench", route_prefix="/", logging_config=quiet)  # type: ignore[attr-defined]
        print("ready", flush=True)
        sys.stdin.read()  # until the benchmark is over, or dead
    finally:
        serve.shutdown()
        cluster.stop()
        ray.shutdown()


def _uvicorn(app: Any, port: int) -> None:
    import threading

    import uvicorn

    config = uvicorn.Config(app, port=port, log_level="error", access_log=False, lifespan="off", backlog=4096)
    server = uvicorn.Server(config)

    def until_over() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=until_over, daemon=True).start()
    threading.Thread(target=_say_ready, args=(server,), daemon=True).start()
    server.run()


def _say_ready(server: Any) -> None:
    while not server.started:
        time.sleep(0.02)
    print("ready", flush=True)


if __name__ == "__main__":
    {"plain": _plain, "ours": _ours, "serve": _serve, "engine": _engine}[sys.argv[1]](int(sys.argv[2]), *sys.argv[3:])

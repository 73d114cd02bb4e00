"""What the gateway costs: with a model of no cost, against LiteLLM's proxy, plain uvicorn and Ray Serve's own ingress.

All servers have one worker and one key. LiteLLM answers from its own `mock_response`, so that neither has an upstream
to wait for; it is installed, pinned, into an environment of its own. Load is `tiger bench`'s closed loop of 16 clients;
contenders take turns in every round.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from benchmarks.decoding import write_models
from benchmarks.gateway_servers import KEY, serve_spec
from benchmarks.harness import Row
from tigerbot.ports import free_port
from tigerbot_serve.bench.fleet import measure
from tigerbot_serve.bench.plan import PROMPTS, Plan, body_texts, target
from tigerbot_serve.bench.report import Report
from tigerbot_serve.engine.engine import Engine
from tigerbot_serve.engine.request import FinishEvent, Request
from tigerbot_serve.ensemble.build import build_engine

LITELLM = "1.100.5"  # the newest whose own parts are all in the registry
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tigerbot-bench"
ROUNDS = int(os.environ.get("GATEWAY_ROUNDS", "5"))
SECONDS = float(os.environ.get("GATEWAY_SECONDS", "8"))
CLIENTS, STREAMS, NEW = 16, 8, 96
ACCEPT_RATE = 50.0  # streams a second: far below what the gateway can take, so that its own delay is what is seen
_FLAGS = ("ENABLE_HA_PROXY", "THROUGHPUT_OPTIMIZED", "HAPROXY_NBTHREAD")  # HAProxy's four threads are for larger nodes
THROUGHPUT = {f"RAY_SERVE_{name}": "1" for name in _FLAGS}


def main() -> list[Row]:
    return [*_against_litellm(), *_against_default_ingress(), *_over_http()]


def _against_litellm() -> list[Row]:
    with ExitStack() as stack:
        urls = {name: stack.enter_context(_server(name)) for name in ("plain", "ours")}
        try:
            urls["litellm"] = stack.enter_context(_litellm())
        except (subprocess.SubprocessError, OSError, TimeoutError) as error:
            print(f"  LiteLLM is not measured: {error}", flush=True)
        found = _in_turn({name: lambda url=url: _load(url) for name, url in urls.items()})
        accepts = [_load(urls["ours"], stream=True, rate=ACCEPT_RATE) for _ in range(ROUNDS)]
    rows = []
    if "litellm" in found:
        rows += [
            _row("requests/s, gateway / LiteLLM's proxy", found, "ours", "litellm", _rate, ">= 10", "higher"),
            _row("p99, gateway / LiteLLM's proxy", found, "ours", "litellm", _p99, "<= 0.25", "lower"),
            _row("p50, gateway / LiteLLM's proxy", found, "ours", "litellm", _p50, "report", "lower"),
        ]
    rows.append(_row("requests/s, gateway / plain uvicorn", found, "ours", "plain", _rate, "report", "higher"))
    values = [one.first_event.p99 for one in accepts if one.first_event is not None]
    note = f"{ACCEPT_RATE:g} streams/s, Poisson, from the planned arrival"
    low, high, middle = min(values), max(values), statistics.median(values)
    rows.append(Row("accept event, p99, ms", middle, low, high, "lower", "<= 5", ROUNDS, note=note))
    return rows


def _against_default_ingress() -> list[Row]:
    with ExitStack() as stack:
        urls = {
            "ours": stack.enter_context(_server("serve", env=THROUGHPUT)),
            "stock": stack.enter_context(_server("serve")),
        }
        found = _in_turn({name: lambda url=url: _load(url) for name, url in urls.items()})
    title = "gateway behind HAProxy and the throughput flags / behind Serve's default ingress"
    return [
        _row(f"requests/s, {title}", found, "ours", "stock", _rate, ">= 6", "higher"),
        _row(f"p99, {title}", found, "ours", "stock", _p99, "report", "lower"),
    ]


def _over_http() -> list[Row]:
    """The same engine, asked over HTTP from another process and by its own: what the way out costs."""
    rows = []
    for preset in ("tiny", "60m"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            members = write_models(preset, folder)
            fields = {"members": members, "scale": {"threads": 1}, "engine": {"max_length": 256}}
            (folder / "serve.json").write_text(json.dumps(fields))
            engine = build_engine(serve_spec(**fields))
            engine.start()
            try:
                with _server("engine", name) as url:
                    http: list[float] = []
                    inside: list[float] = []
                    for _ in range(ROUNDS):
                        http.append(_load(url, stream=True, clients=STREAMS, requests=3 * STREAMS).tokens_per_s)
                        inside.append(_inside(engine))
            finally:
                engine.stop()
        rows.append(
            _ratio_row(f"tokens/s over HTTP / in process, {STREAMS} streams, `{preset}`", http, inside, ">= 0.95")
        )
    return rows


def _load(
    url: str,
    *,
    stream: bool = False,
    clients: int = CLIENTS,
    rate: float = 0.0,
    requests: int = 1_000_000,
) -> Report:
    fields = {"verify": False, "temperature": 1.0, "creativity": 0.5} if stream else {}
    plan = Plan(
        url=target(url, "chat"),
        bodies=body_texts("chat", PROMPTS, model="tiger", stream=stream, max_tokens=NEW, fields=fields),
        clients=0 if rate else clients,
        rate=rate,
        requests=requests,
        duration_s=600.0 if requests < 1_000_000 else SECONDS,
        stream=stream,
        headers=(("authorization", f"Bearer {KEY}"),),
    )
    found = measure(plan)
    if found.good < 0.999 * found.requests or not found.good:
        raise RuntimeError(f"{url}: {found.good} of {found.requests} answered: {found.errors}")
    return found


def _inside(engine: Engine) -> float:
    """Tokens a second of the engine with as many clients as there are streams, each asking three times."""

    async def client(number: int) -> int:
        tokens = 0
        for turn in range(3):
            request = Request(tuple(range(100, 130)), NEW, 0.5, temperature=1.0, seed=10 * number + turn)
            async for event in engine.submit(request, asyncio.get_running_loop()):
                if isinstance(event, FinishEvent):
                    tokens += event.usage.completion_tokens
        return tokens

    async def together() -> int:
        return sum(await asyncio.gather(*(client(number) for number in range(STREAMS))))

    began = time.perf_counter()
    return asyncio.run(together()) / (time.perf_counter() - began)


def _in_turn(contenders: Mapping[str, Callable[[], Report]]) -> dict[str, list[Report]]:
    names, found = list(contenders), {name: [] for name in contenders}
    for name in names:
        contenders[name]()  # once to warm up
    for number in range(ROUNDS):
        for name in names if number % 2 == 0 else names[::-1]:
            found[name].append(contenders[name]())
        said = "; ".join(
            f"{name} {_rate(reports[-1]):.0f}/s p50 {_p50(reports[-1]):.2f} p99 {_p99(reports[-1]):.2f} ms"
            for name, reports in found.items()
        )
        print(f"  round {number + 1}/{ROUNDS}: {said}", flush=True)
    return found


def _row(
    measure: str,
    found: Mapping[str, Sequence[Report]],
    ours: str,
    stock: str,
    value: Callable[[Report], float],
    target: str,
    better: str,
) -> Row:
    mine, theirs = ([value(report) for report in found[name]] for name in (ours, stock))
    unit = "requests/s" if value is _rate else "ms"
    return _ratio_row(f"{measure}, {CLIENTS} clients", mine, theirs, target, better=better, unit=unit)


def _ratio_row(
    measure: str,
    ours: Sequence[float],
    stock: Sequence[float],
    target: str,
    *,
    better: str = "higher",
    unit: str = "tokens/s",
) -> Row:
    ratios = [a / b for a, b in zip(ours, stock, strict=True)]
    shown = (f"{statistics.median(side):.4g} {unit}" for side in (ours, stock))
    return Row(measure, statistics.median(ratios), min(ratios), max(ratios), better, target, len(ratios), *shown)


def _rate(report: Report) -> float:
    return report.requests_per_s


def _p50(report: Report) -> float:
    assert report.total is not None
    return report.total.p50


def _p99(report: Report) -> float:
    assert report.total is not None
    return report.total.p99


@contextmanager
def _server(kind: str, *arguments: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """A server of `gateway_servers`; it ends when its standard input does."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.gateway_servers", kind, str(port), *arguments]
    root = Path(__file__).parents[1]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": paths, **(env or {})},
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        while (line := process.stdout.readline()) != "ready\n":
            if not line:
                raise RuntimeError(f"the server {kind} did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _litellm() -> Iterator[str]:
    """LiteLLM's proxy with a key, limits and an answer of its own."""
    binary, port = _installed(), free_port()
    parameters = {"model": "openai/tiger", "api_key": "none", "mock_response": " word" * 8, "rpm": 10**9, "tpm": 10**12}
    config: dict[str, Any] = {
        "model_list": [{"model_name": "tiger", "litellm_params": parameters}],
        "litellm_settings": {"drop_params": True, "set_verbose": False},
        "general_settings": {"master_key": KEY},
    }
    # Its best: no debug log, and no price list fetched from the network.
    quiet = {"LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "config.yaml"
        path.write_text(json.dumps(config))
        command = [binary, "--config", path, "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **quiet},
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _await(f"{url}/health/liveliness", process)
            yield url
        finally:
            for last in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, last)
                    process.wait(20)


def _installed() -> Path:
    folder = CACHE / f"litellm-{LITELLM}"
    binary = folder / "bin" / "litellm"
    if not binary.exists():
        print(f"  installing litellm[proxy] {LITELLM} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "-q", f"litellm[proxy]=={LITELLM}"], check=True)
    return binary


def _await(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 180
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise TimeoutError("it did not start")

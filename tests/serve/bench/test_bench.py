"""`tiger bench` against small servers that do exactly what a test says: what it counts, times and refuses."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from typer.testing import CliRunner

from tigerbot import cli
from tigerbot.errors import InputError, ServeError
from tigerbot_serve.bench.fleet import measure
from tigerbot_serve.bench.load import arrivals
from tigerbot_serve.bench.plan import PROMPTS, Plan, body_texts, extra_fields, key_headers, read_prompts, target
from tigerbot_serve.bench.report import Report, percentile

GAP_S = 0.02


def chunk(text: str) -> bytes:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n".encode()


class Behaviour:
    """A server whose answer is named by the body's `model`."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()

    async def answer(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("authorization"))
        kind = body["model"]
        if kind == "busy":
            return JSONResponse({"error": {"message": "m", "code": "queue_full"}}, 429)
        if kind == "never":
            await asyncio.sleep(60)
        if kind == "nonsense":
            return Response(b"<html>")
        if kind == "slow":
            await asyncio.sleep(GAP_S)
        if body.get("stream"):
            return StreamingResponse(self._events(kind), media_type="text/event-stream")
        choice = {"index": 0, "message": {"role": "assistant", "content": "你好"}, "finish_reason": "stop"}
        return JSONResponse({"choices": [choice], "usage": {"completion_tokens": 7}})

    async def _events(self, kind: str) -> Any:
        yield chunk("")
        await asyncio.sleep(GAP_S)
        yield chunk("你")[:20]
        yield chunk("你")[20:] + chunk("好")
        if kind == "fails":
            yield b'data: {"error": {"message": "m", "code": "server_error"}}\n\n'
            return
        if kind == "cut":
            raise OSError("gone")
        if kind == "short":
            return
        await asyncio.sleep(GAP_S)
        yield chunk("。") + b'data: {"choices": [], "usage": {"completion_tokens": 5}}\n\ndata: [DONE]\n\n'


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Behaviour]]:
    behaviour = Behaviour()
    app = Starlette(routes=[Route(f"/v1/{path}", behaviour.answer, methods=["POST"]) for path in PATHS])
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not running.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}", behaviour
    running.should_exit = running.force_exit = True
    thread.join(timeout=10)


PATHS = ("chat/completions", "completions")


@pytest.fixture
def run(server: tuple[str, Behaviour]) -> Callable[..., Report]:
    def start(model: str = "m", *, processes: int = 1, stream: bool = True, **fields: Any) -> Report:
        bodies = body_texts("chat", PROMPTS, model=model, stream=stream, max_tokens=5, fields={})
        fields = {"clients": 2, "requests": 6} | fields
        plan = Plan(url=target(server[0], "chat"), bodies=bodies, stream=stream, **fields)
        return measure(plan, processes)

    return start


def test_a_stream_is_timed_at_its_first_event_its_first_text_and_its_end(run: Callable[..., Report]) -> None:
    found = run()

    assert (found.requests, found.good, found.errors, found.tokens) == (6, 6, {}, 30)
    assert found.first_event and found.first_token and found.per_token and found.total
    assert found.first_token.p50 - found.first_event.p50 > 900 * GAP_S  # the first chunk was empty
    assert found.total.p50 - found.first_token.p50 > 900 * GAP_S
    assert found.per_token.count == 6


def test_a_whole_answer_has_no_first_token_and_its_tokens_are_the_servers(run: Callable[..., Report]) -> None:
    found = run(stream=False)

    assert found.good == 6 and found.tokens == 42
    assert found.first_token is None and found.per_token is None and found.total is not None


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("busy", "429 queue_full"),
        ("cut", "broken stream"),
        ("short", "broken stream"),
        ("fails", "stream server_error"),
        ("never", "timeout"),
    ],
)
def test_errors_are_counted_by_kind_and_never_timed(run: Callable[..., Report], model: str, kind: str) -> None:
    found = run(model, requests=3, timeout_s=1.0 if model == "never" else 30.0)

    assert found.errors == {kind: 3}
    assert found.good == 0 and found.total is None


def test_an_answer_that_is_not_openais_is_an_error(run: Callable[..., Report]) -> None:
    assert run("nonsense", stream=False).errors == {"bad answer": 6}


def test_an_open_loop_counts_the_time_that_a_request_waited_to_be_sent(run: Callable[..., Report]) -> None:
    found = run("slow", stream=False, clients=0, rate=500.0, requests=60, max_in_flight=1)

    # One at a time takes at least 60 times the gap, though all were due within a fraction of that.
    assert found.good == 60 and found.total is not None and found.late is not None
    assert found.total.max > 1000 * 60 * GAP_S / 2
    assert found.late.max > 1000 * 60 * GAP_S / 2


def test_arrivals_are_a_poisson_process_that_a_seed_repeats() -> None:
    plan = Plan("u", (), rate=200.0, duration_s=50.0, seed=3)

    due = list(arrivals(plan))

    assert due == list(arrivals(plan)) and due != list(arrivals(Plan("u", (), rate=200.0, duration_s=50.0, seed=4)))
    assert abs(len(due) - 10_000) < 500 and due == sorted(due) and due[-1] < 50
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert 0.9 < variance / mean**2 < 1.1  # 1 for exponential gaps, 0 for a metronome


def test_shares_of_processes_add_up_to_the_plan() -> None:
    plan = Plan("u", (), clients=7, rate=9.0, requests=11, max_in_flight=10)

    shares = [plan.share(index, 3) for index in range(3)]

    assert sum(one.clients for one in shares) == 7 and sum(one.requests for one in shares) == 11
    assert sum(one.rate for one in shares) == pytest.approx(9) and len({one.seed for one in shares}) == 3


def test_several_processes_give_one_report(run: Callable[..., Report]) -> None:
    found = run(processes=2, requests=7)

    assert found.good == 7 and found.tokens == 35 and found.total is not None


def test_percentiles_are_linear_between_neighbours() -> None:
    assert percentile([10.0, 20.0], 50) == 15.0
    assert percentile([float(n) for n in range(101)], 99) == 99.0
    assert percentile([4.0], 99) == 4.0


def test_the_verb_sends_what_it_was_told_and_writes_its_numbers(
    server: tuple[str, Behaviour], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "你好"}\n{"messages": [{"role": "user", "content": "hi"}]}\n', encoding="utf-8")
    server[1].bodies.clear()
    words = f"bench {server[0]}/v1 -n 4 -c 1 --model told --creativity 0.8 --field verify=false --key-env SOME_KEY"

    cli.add_verbs()
    done = CliRunner().invoke(cli.app, [*words.split(), "--prompts", str(prompts), "--out", str(tmp_path / "out.json")])

    assert done.exit_code == 0, done.output
    assert "4 of 4 answered" in done.output and "sk-secret" not in done.output
    sent = server[1].bodies
    assert [body["messages"][0]["content"] for body in sent] == ["你好", "hi", "你好", "hi"]
    assert all(body["creativity"] == 0.8 and body["verify"] is False for body in sent)
    assert "Bearer sk-secret" in server[1].keys
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["good"] == 4 and set(written["total"]) >= {"p50", "p90", "p95", "p99"}
    assert "sk-secret" not in json.dumps(written)


def test_an_interrupt_reports_what_was_measured(server: tuple[str, Behaviour], tmp_path: Path) -> None:
    for processes in (1, 2):
        server[1].bodies.clear()
        out = tmp_path / f"{processes}.json"
        words = f"bench {server[0]} -c 2 --duration 600 --processes {processes} --out {out}"
        running = subprocess.Popen([Path(sys.executable).parent / "tiger", *words.split()], stdout=subprocess.PIPE)
        try:
            until = time.monotonic() + 60
            while len(server[1].bodies) < 8:
                assert time.monotonic() < until and running.poll() is None
                time.sleep(0.02)
            running.send_signal(signal.SIGINT)
            text, _ = running.communicate(timeout=60)
        finally:
            running.kill()
            running.wait()

        assert running.returncode == 0, text
        assert json.loads(out.read_text())["good"] >= 4


def test_nothing_there_is_one_line() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: refused
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1/chat/completions"

        with pytest.raises(ServeError, match="cannot be reached"):
            measure(Plan(url, ("{}",), clients=1, requests=1))


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://a/b", "http://", "http://u:p@h", "http://h:port", "http://h?x"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError):
        target(url, "chat")


def test_mistakes_in_options_say_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "ok"}\n{"text": 1}\n')
    monkeypatch.setenv("SPLIT_KEY", "two words")

    with pytest.raises(InputError, match=r"bad\.jsonl:2"):
        read_prompts(bad, "chat")
    with pytest.raises(InputError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl", "chat")
    with pytest.raises(InputError, match="NAME=JSON"):
        extra_fields(["verify"])
    with pytest.raises(InputError, match="SPLIT_KEY"):
        key_headers("SPLIT_KEY")
    assert key_headers("NOT_SET_ANYWHERE") == ()

"""Clients that send slowly, read slowly, or only sit there: on real sockets, while others are served."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import pytest
from uvicorn import config

from tigerbot_serve.deploy.patience import HEADER_TIMEOUT, be_impatient
from tigerbot_serve.engine.request import Request
from tigerbot_serve.gateway.answers import Shape
from tigerbot_serve.gateway.body import parse_object
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.scan import MAX_CONTAINERS, OutOfBounds, Scanner
from tigerbot_serve.gateway.sse import EventStream

HTTP = httpx.Client(timeout=60)
BODY = {"model": "tiger", "messages": [{"role": "user", "content": "The fox"}], "max_tokens": 3, "seed": 1}
PATH = "/v1/chat/completions"


@contextmanager
def connected(url: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=60) as connection:
        yield connection


def head(*lines: str) -> bytes:
    return "\r\n".join((f"POST {PATH} HTTP/1.1", "host: localhost", *lines, "", "")).encode()


def answer_of(connection: socket.socket) -> tuple[int, Any, bool]:
    """Status, JSON body, and whether the server hung up after it."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += (got := connection.recv(65_536))
        assert got, data
    top, _, rest = data.partition(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in top.split(b"\r\n") if line.lower().startswith(b"content-length"))
    while len(rest) < length:
        rest += connection.recv(65_536)
    closes = b"connection: close" in top.lower()
    return int(top.split()[1]), json.loads(rest), closes and connection.recv(1) == b""


def chunked(data: bytes, size: int) -> bytes:
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that begin in this test give a head a second, as those of a deployed endpoint do."""
    monkeypatch.setitem(config.HTTP_PROTOCOLS, "auto", config.HTTP_PROTOCOLS["auto"])
    monkeypatch.setenv(HEADER_TIMEOUT, "1")
    be_impatient()


def test_a_head_that_drips_is_answered_and_hung_up_on_while_others_are_served(serve_engine, impatient) -> None:
    served = serve_engine()

    with connected(served.url) as slow:
        slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nx: ")
        ended, statuses = dripped_on(slow), []
        while not ended.is_set():
            statuses.append(HTTP.post(served.url + PATH, json=BODY).status_code)
        status, body, hung_up = answer_of(slow)

    assert (status, body["error"]["code"], hung_up) == (408, "header_timeout", True)
    assert set(statuses) == {200}


def dripped_on(connection: socket.socket) -> threading.Event:
    """A byte ten times a second until the other side has said something; set when it has."""
    ended = threading.Event()

    def drip() -> None:
        connection.settimeout(0.1)
        until = time.monotonic() + 60
        with suppress(OSError):  # the other side has gone
            while time.monotonic() < until:
                connection.sendall(b"a")
                with suppress(TimeoutError):
                    connection.recv(1, socket.MSG_PEEK)
                    break
        connection.settimeout(60)
        ended.set()

    threading.Thread(target=drip, daemon=True).start()
    return ended


def test_who_says_nothing_is_hung_up_on_without_a_word(serve_engine, impatient) -> None:
    served = serve_engine()

    with connected(served.url) as silent:
        assert silent.recv(1) == b""


def test_the_deadline_is_for_heads_alone_and_for_each_of_them(serve_engine, impatient) -> None:
    served = serve_engine()
    data = json.dumps(BODY).encode()

    with connected(served.url) as connection:
        connection.sendall(head(f"content-length: {len(data)}") + data[:5])
        time.sleep(1.5)  # longer than a head may take; a body may
        connection.sendall(data[5:])
        assert answer_of(connection)[0] == 200

        connection.sendall(b"\r\n")  # a line that some clients send before the next head
        connection.sendall(head()[:20])
        status, body, hung_up = answer_of(connection)

    assert (status, body["error"]["code"], hung_up) == (408, "header_timeout", True)


def test_a_body_that_trickles_is_given_up_while_others_are_served(serve_engine) -> None:
    served = serve_engine(slow_clients={"body_timeout_s": 1.0})
    data = json.dumps(BODY).encode()

    with connected(served.url) as slow:
        slow.sendall(head(f"content-length: {len(data)}") + data[:5])
        assert HTTP.post(served.url + PATH, json=BODY).status_code == 200
        status, body, hung_up = answer_of(slow)

    assert (status, body["error"]["code"], hung_up) == (408, "body_timeout", True)
    served.settle()


def test_a_chunked_body_is_read_like_any_other(serve_engine) -> None:
    served = serve_engine()
    data = json.dumps(BODY, ensure_ascii=False).encode()

    for size in (1, 7, 4096):
        with connected(served.url) as connection:
            connection.sendall(head("transfer-encoding: chunked") + chunked(data, size) + b"0\r\n\r\n")
            status, body, _ = answer_of(connection)
        assert status == 200 and body["choices"][0]["message"]["content"] is not None


@pytest.mark.parametrize(
    ("piece", "status", "code"),
    [
        (b'{"user": "' + b"x" * 3000, 413, "request_too_large"),
        (b'{"a": ' + b"[" * 40, 400, "invalid_json"),
        (b'{"messages": [' + b'{"role": "user"},' * 9, 400, "invalid_value"),
    ],
)
def test_what_breaks_a_bound_is_refused_before_the_rest_arrives(serve_engine, piece, status, code) -> None:
    served = serve_engine(http={"max_body_bytes": 2000, "max_messages": 8})

    with connected(served.url) as connection:
        connection.sendall(head("transfer-encoding: chunked") + chunked(piece, 50))  # and no end
        found, body, hung_up = answer_of(connection)

    assert (found, body["error"]["code"], hung_up) == (status, code, True)


def test_an_announced_size_is_refused_before_anything_arrives(serve_engine) -> None:
    served = serve_engine()

    with connected(served.url) as connection:
        connection.sendall(head("content-length: 99999999"))
        status, body, hung_up = answer_of(connection)

    assert (status, body["error"]["code"], hung_up) == (413, "request_too_large", True)


def test_a_client_that_leaves_in_its_body_harms_nobody(serve_engine) -> None:
    served = serve_engine()

    for _ in range(5):
        with connected(served.url) as connection:
            connection.sendall(head("content-length: 1000") + b'{"model"')

    assert HTTP.post(served.url + PATH, json=BODY).status_code == 200
    served.settle()


def test_a_thousand_idle_connections_do_not_keep_others_from_being_served(serve_engine) -> None:
    served = serve_engine()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    if wanted < 2500:
        pytest.skip(f"2,500 open files are needed, {wanted} may be opened")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        with ExitStack() as idle:
            held = [idle.enter_context(connected(served.url)) for _ in range(1000)]
            for connection in held[::2]:
                connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: loc")  # and no more

            answers = [HTTP.post(served.url + PATH, json=BODY) for _ in range(5)]
            streamed = HTTP.post(served.url + PATH, json=BODY | {"stream": True}).text

        assert all(answer.status_code == 200 for answer in answers)
        assert streamed.endswith("data: [DONE]\n\n")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert HTTP.post(served.url + PATH, json=BODY).status_code == 200


def test_a_stream_that_nobody_reads_frees_its_slot(engine_of) -> None:
    engine = engine_of("lora", engine={"max_length": 512, "slots": 1})
    shape = Shape(id="x", model="tiger", tokenizer=engine.tokenizer, chat=True)

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # as uvicorn's send does while the client's window is full

    async def stays() -> Any:
        await asyncio.Event().wait()

    async def run() -> None:
        request = Request((70, 71, 72), 400, 0.5, temperature=2.0)
        handle = engine.submit(request, asyncio.get_running_loop())
        stream = EventStream([handle], shape, usage=False, timeout_s=300, headers={}, write_timeout_s=0.5)
        await asyncio.wait_for(stream({"type": "http"}, stays, stuck), 60)

    asyncio.run(run())

    until = time.monotonic() + 20
    while engine.stats().slots_used:
        assert time.monotonic() < until, "the slot is still held"
        time.sleep(0.01)
    assert engine.stats().tokens_decoded < 400


def test_a_socket_that_is_not_read_frees_its_slots(serve_engine) -> None:
    served = serve_engine(engine={"max_length": 2000}, slow_clients={"write_timeout_s": 1.0})
    wordy = BODY | {"max_tokens": 1900, "stream": True, "logprobs": True, "top_logprobs": 20, "temperature": 2.0}
    data = json.dumps(wordy | {"n": 2}).encode()
    before = threading.active_count()

    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", int(served.url.rsplit(":", 1)[1])))
        deaf.sendall(head(f"content-length: {len(data)}") + data)
        until = time.monotonic() + 120
        while not served.engine.stats().slots_used:
            assert time.monotonic() < until
            time.sleep(0.01)
        while served.engine.stats().slots_used:
            assert time.monotonic() < until, "the slots are still held"
            time.sleep(0.01)

    assert served.engine.stats().tokens_decoded < 2 * 1900
    assert HTTP.post(served.url + PATH, json=BODY).status_code == 200
    assert threading.active_count() <= before + 1


def test_bounds_do_not_depend_on_how_a_text_is_cut() -> None:
    text = json.dumps({"a": ['"[{\\', {"b": "\\\\"}], "messages": [{"role": "u"}] * 3}).encode()

    for size in range(1, 9):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        fits, deep = Scanner(3, 3), Scanner(2, 3)
        for piece in pieces:
            fits.feed(piece)
        with pytest.raises(OutOfBounds, match="deeper than 2"):
            for piece in pieces:
                deep.feed(piece)


def test_brackets_inside_text_are_no_depth_and_too_many_outside_are_refused() -> None:
    assert parse_object(json.dumps({"a": '[{"\\' * 1000}).encode())["a"].startswith("[{")

    with pytest.raises(ApiError, match="objects and arrays"):
        parse_object(b'{"a": [' + b"[]," * MAX_CONTAINERS + b"[]]}")
    with pytest.raises(ApiError, match="too large"):
        parse_object(b'{"a": 1e999}')

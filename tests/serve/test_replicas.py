"""Two replicas under Ray Serve: one limit for both, keys read from a file while they serve, our own deadline."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tigerbot.ports import free_port
from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_serve.deploy import deploy
from tigerbot_serve.gateway.key_file import new_key, revoke_key

pytestmark = pytest.mark.soak

LIMIT = 20
BODY = {"model": "tiger", "messages": [{"role": "user", "content": "The fox"}], "max_tokens": 4, "verify": False}


@pytest.fixture(scope="module")
def served(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("replicas")
    secrets = {}
    for user in ("limited", "free", "gone"):
        entry, secrets[user] = new_key(folder / "keys.yaml", user, expires=None, scopes=("chat", "admin"))
        secrets[f"{user}-id"] = entry.id
    text = (folder / "keys.yaml").read_text()
    mark = f"id: {secrets['limited-id']}\n"
    limits = f"  limits: {{requests_per_minute: {LIMIT}, budget: {{tokens: 100000}}}}\n"
    (folder / "keys.yaml").write_text(text.replace(mark, mark + limits))
    spec = parse_spec(
        {
            "kind": "serve",
            "name": "replicas",
            "members": {"base": str(world.base), **world.members("lora")},
            "engine": {"slots": 4, "max_length": 900},
            "http": {"port": free_port(), "keys_file": str(folder / "keys.yaml"), "request_timeout_s": 2},
            "scale": {"threads": 1, "replicas": 2},
            "storage": {"uri": str(folder)},
        }
    )
    assert isinstance(spec, ServeSpec)
    endpoint = deploy(spec, folder)
    yield endpoint.url, folder, secrets
    endpoint.stop()


def ask(url: str, key: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    named = {"authorization": f"Bearer {key}"} | (headers or {})
    with httpx.Client(timeout=60) as fresh:  # a connection of its own: Serve spreads connections over replicas
        return fresh.post(f"{url}/v1/chat/completions", json=BODY | fields, headers=named)


def until(holds: Any) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_two_replicas_let_through_what_the_key_may_and_the_budget_is_written_down(served) -> None:
    url, folder, secrets = served

    statuses = [ask(url, secrets["limited"]).status_code for _ in range(3 * LIMIT)]

    assert LIMIT // 2 <= statuses.count(200) <= LIMIT, statuses
    assert set(statuses) == {200, 429}
    assert ask(url, secrets["free"]).status_code == 200
    until(lambda: (folder / "budgets.json").exists())
    audits = list(folder.glob("audit/*.jsonl"))
    assert len(audits) == 2, "both replicas answered, each with a file of its own"


def test_a_key_that_is_revoked_is_refused_by_every_replica(served) -> None:
    url, folder, secrets = served
    assert ask(url, secrets["gone"]).status_code == 200

    revoke_key(folder / "keys.yaml", secrets["gone-id"])

    until(lambda: all(ask(url, secrets["gone"]).status_code == 401 for _ in range(6)))
    assert ask(url, secrets["free"]).status_code == 200


def test_headers_that_switch_serves_own_guards_off_do_not_switch_off_ours(served) -> None:
    url, _, secrets = served
    off = {"x-request-timeout-seconds": "-1", "x-request-disconnect-disabled": "?1"}

    late = ask(url, secrets["free"], off, max_tokens=880, temperature=2.0)
    assert late.status_code in (504, 200)
    if late.status_code == 504:
        assert late.headers["x-should-retry"] == "false"

    data = json.dumps(BODY | {"max_tokens": 880, "temperature": 2.0, "stream": True}).encode()
    lines = [f"{name}: {value}" for name, value in off.items()]
    head = "\r\n".join(
        ["POST /v1/chat/completions HTTP/1.1", "host: localhost", f"authorization: Bearer {secrets['free']}", *lines]
    )
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(f"{head}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
        connection.recv(1000)
    until(lambda: all("tiger_slots_used 0" in httpx.get(f"{url}/metrics").text for _ in range(6)))

"""The endpoint under Ray Serve, as `tiger serve` deploys it, and the terminal client against it."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from tigerbot.errors import ModelError, ServeError
from tigerbot.ports import free_port
from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_serve.deploy import deploy

TIGER = [sys.executable, "-m", "tigerbot.cli"]


def spec_of(world: Any, storage: Path, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "serve",
        "name": "ensemble",
        "members": {"base": str(world.base), **world.members("lora")},
        "engine": {"slots": 4, "max_length": 900},
        "http": {"port": free_port()},
        "scale": {"threads": 1},
        "slow_clients": {"header_timeout_s": 5},
        "storage": {"uri": str(storage)},
    } | fields


FIRST = {"authorization": "Bearer first"}
QUESTION = {"model": "tiger", "messages": [{"role": "user", "content": "fox"}]}


@dataclass(frozen=True)
class Served:
    url: str
    process: subprocess.Popen
    raw: dict[str, Any]
    storage: Path

    def tiger_serve(self, raw: dict[str, Any]) -> subprocess.CompletedProcess:
        """A second `tiger serve` of the name."""
        path = self.storage / "second.yaml"
        path.write_text(yaml.safe_dump(raw))
        return subprocess.run([*TIGER, "serve", str(path)], capture_output=True, text=True, timeout=400)


class Asking:
    """One short question after another in a thread, and the statuses they got."""

    def __init__(self, url: str) -> None:
        self._url, self._statuses, self._ended = url, [], threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def stop(self) -> list[int]:
        self._ended.set()
        self._thread.join()
        return self._statuses

    def _ask(self) -> None:
        body = QUESTION | {"max_tokens": 2, "verify": False}
        while not self._ended.wait(0.05):
            answer = httpx.post(f"{self._url}/v1/chat/completions", json=body, headers=FIRST, timeout=120)
            self._statuses.append(answer.status_code)


@pytest.fixture(scope="module")
def served(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    storage = tmp_path_factory.mktemp("serve")
    raw = spec_of(world, storage)
    path = storage / "ensemble.yaml"
    path.write_text(yaml.safe_dump(raw))
    environment = os.environ | {"TIGER_API_KEYS": "first,second"}
    process = subprocess.Popen([*TIGER, "serve", str(path)], env=environment)
    url = f"http://127.0.0.1:{raw['http']['port']}"
    until = time.monotonic() + 280
    while True:
        assert process.poll() is None and time.monotonic() < until
        try:
            if httpx.get(f"{url}/healthz").status_code == 200:
                break
        except httpx.HTTPError:
            time.sleep(0.2)
    yield Served(url, process, raw, storage)
    if process.poll() is None:
        process.kill()


def test_the_deployed_endpoint_streams_checks_keys_and_frees_slots(served: Served) -> None:
    url = served.url
    api = openai.OpenAI(base_url=f"{url}/v1", api_key="second", max_retries=0, timeout=60)
    asked: Any = {"model": "tiger", "messages": [{"role": "user", "content": "狐狸 fox"}], "max_tokens": 20, "seed": 1}

    whole = api.chat.completions.create(**asked, extra_body={"creativity": 0.5, "verify": False})
    chunks = api.chat.completions.create(**asked, stream=True, extra_body={"creativity": 0.5, "verify": False})

    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert httpx.get(f"{url}/v1/models").status_code == 401
    _leave_in_the_middle(url)
    until = time.monotonic() + 10
    while "tiger_slots_used 0" not in _metrics(url):
        assert time.monotonic() < until, "the slot of a client that left is still held"
        time.sleep(0.05)


def _leave_in_the_middle(url: str) -> None:
    body = {"model": "tiger", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 800, "temperature": 2.0}
    data = json.dumps(body | {"stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer first\r\ncontent-length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + data)
        until = time.monotonic() + 10
        while "tiger_slots_used 1" not in _metrics(url):
            assert time.monotonic() < until
        connection.recv(1000)


def _metrics(url: str) -> str:
    return httpx.get(f"{url}/metrics", headers={"authorization": "Bearer first"}).text


def test_a_thousand_heads_that_never_end_are_hung_up_on_while_others_are_served(served: Served) -> None:
    port = int(served.url.rsplit(":", 1)[1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2500:
        pytest.skip(f"2,500 open files are needed, {hard} may be opened")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2500), hard))
    try:
        with ExitStack() as opened:
            idle = [opened.enter_context(socket.create_connection(("127.0.0.1", port), 60)) for _ in range(1000)]
            for connection in idle[::2]:
                connection.sendall(b"GET / HTTP/1.1\r\nx: a")

            answer = httpx.post(f"{served.url}/v1/chat/completions", json=QUESTION, headers=FIRST, timeout=120)
            said = [connection.recv(12) for connection in idle]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert answer.status_code == 200
    assert said == [b"HTTP/1.1 408", b""] * 500


def test_the_terminal_client_answers_in_both_languages(served: Served) -> None:
    url = served.url
    for text in ("The fox", "狐狸在河边"):
        command = [*TIGER, "chat", "--url", url, "--creativity", "0.8", text]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=os.environ | {"TIGER_API_KEY": "first"}
        )
        assert done.returncode == 0 and done.stdout.strip()
    refused = subprocess.run([*TIGER, "chat", "--url", url, "x"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 1 and "HTTP 401" in refused.stderr and len(refused.stderr.strip().splitlines()) == 1


def test_a_second_serve_of_the_name_updates_it_while_answers_run(served: Served) -> None:
    long = {"max_tokens": 600, "temperature": 2.0, "stream": True} | QUESTION
    spec = served.raw | {"engine": {"slots": 3, "max_length": 900}}

    with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=long, headers=FIRST, timeout=300) as under_way:
        pieces = under_way.iter_lines()
        next(pieces)
        asking = Asking(served.url)
        done = served.tiger_serve(spec)
        rest = list(pieces)
    statuses = asking.stop()

    assert done.returncode == 0, done.stderr
    assert re.search(r"version [0-9a-f]{12} in", done.stdout)
    assert rest[-2:] == ["data: [DONE]", ""]
    assert statuses and set(statuses) == {200}
    assert "tiger_slots 3" in _metrics(served.url)
    again = served.tiger_serve(spec)
    assert again.returncode == 0 and "nothing differs" in again.stdout


def test_an_update_that_cannot_be_served_leaves_the_old_one(
    served: Served, heads: Any, world: Any, tmp_path: Path
) -> None:
    before = _metrics(served.url)
    damaged = tmp_path / "damaged"
    shutil.copytree(world.creative_full, damaged)
    os.truncate(damaged / "model.safetensors", 5000)

    broken = served.tiger_serve(served.raw | {"members": {"creative": str(damaged)}})
    foreign = served.tiger_serve(served.raw | {"heads": str(heads(creative_hash="0" * 16))})
    moved = served.tiger_serve(served.raw | {"http": {"port": free_port()}})

    assert broken.returncode == 2 and "is damaged" in broken.stderr
    assert foreign.returncode == 2 and "heads of another model" in foreign.stderr
    assert "the old version serves on" in foreign.stderr and len(foreign.stderr.strip().splitlines()) == 1
    assert moved.returncode == 2 and "http.port" in moved.stderr
    assert _metrics(served.url).splitlines()[0] == before.splitlines()[0]


@pytest.mark.soak
def test_replicas_that_do_not_start_are_taken_back(served: Served, world: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(world.creative_full, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model"}))
    asking = Asking(served.url)

    done = served.tiger_serve(served.raw | {"members": {"creative": str(broken)}})

    assert done.returncode == 2 and "the old version serves on" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert set(asking.stop()) == {200}
    assert served.tiger_serve(served.raw | {"scale": {"threads": 1}}).returncode == 0


def test_status_shows_the_endpoint_and_its_replicas(served: Served) -> None:
    until = time.monotonic() + 60
    while True:
        shown = subprocess.run([*TIGER, "status", "--in", str(served.storage)], capture_output=True, text=True).stdout
        if "1 replicas" in shown:
            break
        assert time.monotonic() < until, shown

    assert served.url in shown and "answers" in shown


def test_ctrl_c_leaves_nothing_running(served: Served) -> None:
    url, process = served.url, served.process
    children = psutil.Process(process.pid).children(recursive=True)

    process.send_signal(signal.SIGINT)

    assert process.wait(timeout=60) == 0
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not [child.name() for child in alive]
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url}/healthz")


def serve_spec(raw: dict[str, Any]) -> ServeSpec:
    spec = parse_spec(raw)
    assert isinstance(spec, ServeSpec)
    return spec


def test_an_open_host_without_keys_is_refused(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIGER_API_KEYS", raising=False)
    raw = spec_of(world, tmp_path, http={"host": "0.0.0.0"})

    with pytest.raises(ServeError, match="would answer everybody"):
        deploy(serve_spec(raw), tmp_path)


def test_missing_members_are_named_before_anything_starts(world: Any, tmp_path: Path) -> None:
    raw = spec_of(world, tmp_path, members={"creative": "/nowhere"})

    with pytest.raises(ModelError, match=r"members.creative: /nowhere: there is no such folder"):
        deploy(serve_spec(raw), tmp_path)


def test_a_port_in_use_is_one_line(world: Any, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        raw = spec_of(world, tmp_path, http={"port": taken.getsockname()[1]})
        path = tmp_path / "s.yaml"
        path.write_text(yaml.safe_dump(raw))

        done = subprocess.run([*TIGER, "serve", str(path)], capture_output=True, text=True, timeout=90)

    assert done.returncode == 2 and "is in use" in done.stderr.strip().splitlines()[-1]

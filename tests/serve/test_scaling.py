"""Endpoints under Ray Serve that grow, sleep, lose a replica, judge a canary and follow an alias."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from mlflow import MlflowClient

from tigerbot.mlflow_server import serve_tracking
from tigerbot.models import build, load_tokenizer, save_model
from tigerbot.ports import free_port
from tigerbot.registry import register

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

TIGER = [sys.executable, "-m", "tigerbot.cli"]
KEYS = {"TIGER_API_KEYS": "first"}
FIRST = {"authorization": "Bearer first"}
QUESTION = {"model": "tiger", "messages": [{"role": "user", "content": "The fox"}], "verify": False}


class Serving:
    """`tiger serve` of a spec in a process of its own."""

    def __init__(self, raw: dict[str, Any], folder: Path) -> None:
        self.spec = path = folder / f"{raw['name']}.yaml"
        path.write_text(yaml.safe_dump(raw))
        self.url = f"http://127.0.0.1:{raw['http']['port']}"
        self.log = folder / f"{raw['name']}.log"
        self.folder = Path(raw["storage"]["uri"]) / raw["name"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen([*TIGER, "serve", str(path)], stdout=log, stderr=log, env=os.environ | KEYS)

    def until(self, what: str, holds: Callable[[], Any], timeout_s: float = 240) -> Any:
        end = time.monotonic() + timeout_s
        while not (found := holds()):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, f"not within {timeout_s} s: {what}\n{self.log.read_text()[-3000:]}"
            time.sleep(0.2)
        return found

    @property
    def is_up(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz").status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def note(self) -> str:
        """What `tiger status` shows of it."""
        try:
            return json.loads((self.folder / "endpoint.json").read_text())["note"]
        except (OSError, ValueError):
            return ""

    def ask(self, *, user: str = "", **fields: Any) -> httpx.Response:
        body = QUESTION | {"max_tokens": 4} | fields | ({"user": user} if user else {})
        with httpx.Client(timeout=240) as fresh:
            return fresh.post(f"{self.url}/v1/chat/completions", json=body, headers=FIRST)

    def serve_again(self, raw: dict[str, Any]) -> None:
        """The same name with another spec, from another process."""
        self.spec.write_text(yaml.safe_dump(raw))
        command = [*TIGER, "serve", str(self.spec)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | KEYS)
        assert done.returncode == 0, done.stderr

    def replicas(self) -> list[psutil.Process]:
        ours = psutil.Process(self.process.pid).children(recursive=True)
        return [one for one in ours if "ServeReplica" in _words(one)]


@contextmanager
def serving(world: Any, folder: Path, name: str, **fields: Any) -> Iterator[Serving]:
    raw = {
        "kind": "serve",
        "name": name,
        "members": {"base": str(world.base), **world.members("lora")},
        "engine": {"slots": 4, "max_length": 900},
        "http": {"port": free_port()},
        "scale": {"threads": 1},
        "storage": {"uri": str(folder)},
    } | fields
    one = Serving(raw, folder)
    try:
        one.until("up", lambda: one.is_up)
        yield one
    finally:
        one.process.send_signal(signal.SIGINT)
        try:
            one.process.wait(60)
        finally:
            one.process.kill()


class Load:
    """Clients that ask for long answers, one after another."""

    def __init__(self, one: Serving, clients: int, tokens: int) -> None:
        self._one, self._tokens = one, tokens
        self._ended, self.found = threading.Event(), Counter[str]()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Counter[str]:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        return self.found

    def _ask(self) -> None:
        while not self._ended.is_set():
            try:
                answer = self._one.ask(max_tokens=self._tokens, temperature=2.0)
                retryable = answer.status_code in (429, 503) and "retry-after" in answer.headers
                other = (
                    "200" if answer.status_code == 200 else f"{answer.status_code} {answer.headers} {answer.text[:300]}"
                )
                self.found["retry" if retryable else other] += 1
            except httpx.TransportError:
                self.found["retry"] += 1


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_replicas_come_with_the_load_go_without_it_and_sleep_until_somebody_asks(world: Any, tmp_path: Path) -> None:
    scale = {
        "threads": 1,
        "replicas": [0, 2],
        "target_tokens_per_replica": 600,
        "autoscale": {"upscale_delay_s": 1, "downscale_delay_s": 5, "downscale_to_zero_delay_s": 5},
    }
    with serving(world, tmp_path, "grows", scale=scale) as one:
        load = Load(one, clients=4, tokens=600)
        one.until("two replicas", lambda: one.note.startswith("2 "))
        found = load.stop()
        one.until("none", lambda: one.note.startswith("0 "))

        answer = one.ask()

        assert set(found) == {"200"}
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"]


def test_a_killed_replica_fails_only_what_a_client_asks_again_and_is_replaced(world: Any, tmp_path: Path) -> None:
    with serving(world, tmp_path, "struck", scale={"threads": 1, "replicas": 2}) as one:
        one.until("two replicas", lambda: one.note.startswith("2 "))
        load = Load(one, clients=4, tokens=100)
        one.until("answers", lambda: load.found["200"] >= 4)
        victim, *_ = before = one.replicas()
        os.kill(victim.pid, signal.SIGKILL)
        one.until(
            "another in its place",
            lambda: one.note.startswith("2 ") and len(one.replicas()) == 2 and victim not in one.replicas(),
        )
        found = load.stop()

        assert len(before) == 2
        assert set(found) <= {"200", "retry"}, found
        assert found["retry"] <= 8, "those under way, and those that came before the proxy knew"
        assert one.ask().status_code == 200


def test_behind_haproxy_an_update_loses_nothing_and_a_killed_replica_what_is_asked_again(
    world: Any, tmp_path: Path
) -> None:
    network = {"http": {"host": "0.0.0.0", "port": free_port()}, "scale": {"threads": 1, "replicas": 2}}
    with serving(world, tmp_path, "open", **network) as one:
        one.until("two replicas", lambda: one.note.startswith("2 "))
        proxies = [child for child in psutil.process_iter() if "tiger-haproxy" in _words(child)]
        load = Load(one, clients=4, tokens=40)
        one.serve_again(yaml.safe_load(one.spec.read_text()) | {"engine": {"slots": 3, "max_length": 900}})
        updated = load.stop()
        one.until("two replicas", lambda: one.note.startswith("2 "))
        load = Load(one, clients=4, tokens=40)
        one.until("answers", lambda: load.found["200"] >= 4)
        os.kill(one.replicas()[0].pid, signal.SIGKILL)
        time.sleep(20)
        struck = load.stop()

        assert proxies, "no HAProxy runs"
        assert set(updated) == {"200"} and updated["200"] > 10
        assert set(struck) <= {"200", "retry"}, struck
        assert struck["retry"] <= 8


def test_a_canary_that_answers_slower_is_taken_back_and_nobody_is_refused(world: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(world.base)
    save_model(build("60m", len(tokenizer), seed=5), tokenizer, tmp_path / "heavy")
    canary = {"members": {"creative": str(tmp_path / "heavy")}, "percent": 50, "min_answers": 20}
    with serving(world, tmp_path, "tries", members={"creative": str(world.creative_full)}, canary=canary) as one:
        statuses: Counter[int] = Counter()

        def judged() -> bool:
            for number in range(8):
                statuses[one.ask(user=f"user {number}", max_tokens=16).status_code] += 1
            return "taken back" in one.note

        one.until("a decision", judged)
        told = json.loads((one.folder / "canary.json").read_text())
        sides = {one.ask(user=f"user {number}").json()["system_fingerprint"] for number in range(8)}

        assert set(statuses) == {200}
        assert told["canary"]["p99_s_per_token"] > told["rest"]["p99_s_per_token"]
        assert len(sides) == 1, "everybody is the rest's again"
        assert "the canary is taken back" in one.log.read_text()


def test_an_alias_that_moves_is_served_without_a_refused_answer(world: Any, tmp_path: Path) -> None:
    server = serve_tracking(f"sqlite:///{tmp_path}/mlflow.db")
    try:
        _promote(server.url, world.creative_full, tmp_path / "one")
        fields = {"members": {"creative": "models:/tiger@creative"}, "follow": True, "tracking": {"uri": server.url}}
        with serving(world, tmp_path, "follows", **fields) as one:
            before = _version(one)
            load = Load(one, clients=1, tokens=4)
            _promote(server.url, world.factual_full, tmp_path / "two")

            one.until("the other version", lambda: _version(one) not in ("", before))

            assert set(load.stop()) == {"200"}
            assert "an alias moved" in one.log.read_text()
    finally:
        server.stop()


def _version(one: Serving) -> str:
    try:
        return one.ask().json()["system_fingerprint"]
    except (httpx.TransportError, KeyError):
        return ""


def _promote(uri: str, model: Path, folder: Path) -> None:
    """As `tiger promote` does after a finished run."""
    shutil.copytree(model, folder)
    api = MlflowClient(uri)
    run = api.create_run("0")
    register(api, run.info.run_id, str(folder), "creative", at=int(1000 * time.time()))

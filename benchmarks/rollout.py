"""Requests that are lost or doubled while an endpoint is updated, shrinks, and loses a replica to `kill -9`.

A mixed load (short, streamed, long, keep-alive and fresh connections) runs against two replicas while they are replaced
by another version, then by one replica; every request has to end with one whole answer. Then one of two replicas is
killed: what fails has to fail so that a client's SDK asks again (503 with retry-after, or a broken connection), and
asking again has to succeed.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.decoding import write_models
from benchmarks.harness import Row
from tigerbot.ports import free_port
from tigerbot.spec import ServeSpec, parse_spec

REQUESTS, CLIENTS, KILLED_REQUESTS = 10_000, 8, 500
WHOLE = "whole"


def main(requests: int = REQUESTS, killed_requests: int = KILLED_REQUESTS) -> list[Row]:
    from tigerbot_serve.deploy import deploy

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models("tiny", folder)
        port = free_port()
        endpoint = deploy(_spec(folder, port, replicas=2, slots=8), folder)
        try:
            load = Load(endpoint.url, requests)
            endpoint.update(_spec(folder, port, replicas=2, slots=7))
            endpoint.update(_spec(folder, port, replicas=1, slots=7))
            calm = load.finish()
            endpoint.update(_spec(folder, port, replicas=2, slots=7))
            load = Load(endpoint.url, killed_requests)
            load.wait_for(killed_requests // 10)
            _kill_a_replica()
            struck = load.finish()
        finally:
            endpoint.stop()
    retried = sum(count for kind, count in struck.items() if kind.startswith("retry"))
    lost = sum(count for kind, count in struck.items() if kind != WHOLE) - retried
    return [
        _row("update and downscale under load: requests lost or doubled", requests, calm.total() - calm[WHOLE], calm),
        _row("a replica killed under load: requests that no retry would save", killed_requests, lost, struck),
    ]


def _row(measure: str, requests: int, bad: int, found: Counter[str]) -> Row:
    rest = ", ".join(f"{kind} {count}" for kind, count in found.most_common() if kind != WHOLE)
    note = f"{requests} mixed requests, {found[WHOLE]} whole" + (f"; {rest}" if rest else "")
    return Row(measure, bad, bad, bad, "lower", "0", 1, note=note)


class Load:
    """A number of mixed requests from some clients at once; what became of each."""

    def __init__(self, url: str, requests: int) -> None:
        self._url, self._left, self._found = url, requests, Counter()
        self._lock = threading.Lock()
        self._clients = [threading.Thread(target=self._client) for _ in range(CLIENTS)]
        for client in self._clients:
            client.start()

    def wait_for(self, answers: int) -> None:
        while self._found.total() < answers and any(client.is_alive() for client in self._clients):
            time.sleep(0.05)

    def finish(self) -> Counter[str]:
        for client in self._clients:
            client.join()
        return self._found

    def _client(self) -> None:
        with httpx.Client(timeout=200) as kept:
            while (number := self._next()) is not None:
                if number % 4 == 3:
                    with httpx.Client(timeout=200) as fresh:
                        outcome = _ask(fresh, self._url, number)
                else:
                    outcome = _ask(kept, self._url, number)
                with self._lock:
                    self._found[outcome] += 1

    def _next(self) -> int | None:
        with self._lock:
            self._left -= 1
            return self._left if self._left >= 0 else None


def _ask(client: httpx.Client, url: str, number: int) -> str:
    tokens = 300 if number % 50 == 0 else 4
    body: dict[str, Any] = {
        "model": "tiger",
        "messages": [{"role": "user", "content": f"fox {number}"}],
        "max_tokens": tokens,
        "verify": False,
        "stream": number % 2 == 0,
    }
    try:
        answer = client.post(f"{url}/v1/chat/completions", json=body)
    except httpx.TransportError as error:
        return f"retry: {type(error).__name__}"
    if answer.status_code in (429, 503) and "retry-after" in answer.headers:
        return f"retry: {answer.status_code}"
    if answer.status_code != 200:
        return f"HTTP {answer.status_code}"
    ends = answer.text.count('"finish_reason":"') + answer.text.count('"finish_reason": "')
    whole = ends == 1 and (not body["stream"] or answer.text.count("data: [DONE]") == 1)
    return WHOLE if whole else f"{ends} ends"


def _kill_a_replica() -> None:
    """The newest that this process's Ray started: an older one may be about to leave."""
    mine = psutil.Process().children(recursive=True)
    replicas = [process for process in mine if "ServeReplica" in " ".join(process.cmdline())]
    os.kill(max(replicas, key=psutil.Process.create_time).pid, signal.SIGKILL)


def _spec(folder: Path, port: int, *, replicas: int, slots: int) -> ServeSpec:
    raw = {
        "kind": "serve",
        "name": "rollout",
        "members": {"creative": str(folder / "lora-creative")},
        "engine": {"slots": slots, "max_length": 480},
        "http": {"port": port},
        "scale": {"replicas": replicas, "threads": 1},
    }
    spec = parse_spec(raw)
    assert isinstance(spec, ServeSpec)
    return spec

"""From a load step to the first answer of the new replica: our policy on outstanding tokens against Serve's defaults.

Both serve the same model behind the same proxy, from one replica to two. The load is long streamed answers, more than
one replica should have; what is timed is from the first of them to the first answer that another replica gives. Serve's
side is its own autoscaler as it comes: two ongoing requests a replica, 30 s of delay, its window and interval.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.decoding import write_models
from benchmarks.harness import Row, ratio
from tigerbot.ports import free_port
from tigerbot.spec import ServeSpec, parse_spec

PAIRS, CLIENTS, DEADLINE_S = 5, 6, 240.0


def main(pairs: int = PAIRS, preset: str = "tiny") -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(preset, folder)
        return [
            ratio(
                f"load step to the first answer of the second replica, `{preset}`",
                lambda: _scale_up(folder, stock=False),
                lambda: _scale_up(folder, stock=True),
                unit="s",
                target="<= 0.25",
                better="lower",
                pairs=pairs,
                note="of it, a replica's start is the same on both sides",
            )
        ]


def _scale_up(folder: Path, *, stock: bool) -> float:
    with _served(folder, stock=stock) as url, httpx.Client(timeout=30) as client:
        first = _replica(client, url)
        ended = threading.Event()
        load = [threading.Thread(target=_ask_on, args=(url, ended), daemon=True) for _ in range(CLIENTS)]
        began = time.perf_counter()
        for thread in load:
            thread.start()
        try:
            while _replica(client, url) == first:
                if time.perf_counter() - began > DEADLINE_S:
                    raise RuntimeError("no second replica answered")
                time.sleep(0.05)
            return time.perf_counter() - began
        finally:
            ended.set()
            for thread in load:
                thread.join()


def _replica(client: httpx.Client, url: str) -> str:
    return client.get(f"{url}/healthz").headers.get("x-tiger-replica", "")


def _ask_on(url: str, ended: threading.Event) -> None:
    body: dict[str, Any] = {
        "model": "tiger",
        "messages": [{"role": "user", "content": "fox"}],
        "max_tokens": 400,
        "stream": True,
        "verify": False,
    }
    while not ended.is_set():
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=DEADLINE_S) as answer:
            for _ in answer.iter_lines():
                if ended.is_set():
                    return


@contextmanager
def _served(folder: Path, *, stock: bool) -> Iterator[str]:
    from tigerbot_serve.deploy import deploy, replica

    raw = {
        "kind": "serve",
        "name": "scale-up",
        "members": {"creative": str(folder / "lora-creative")},
        "engine": {"slots": 8, "max_length": 480},
        "http": {"port": free_port()},
        "scale": {"replicas": [1, 2], "threads": 1, "target_tokens_per_replica": 600},
    }
    spec = parse_spec(raw)
    assert isinstance(spec, ServeSpec)
    ours = replica.autoscaling
    if stock:
        replica.autoscaling = lambda scale: {"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}}
    try:
        endpoint = deploy(spec, folder)
    finally:
        replica.autoscaling = ours
    try:
        yield endpoint.url
    finally:
        endpoint.stop()


if __name__ == "__main__":
    from benchmarks.harness import table

    print(table(main()))

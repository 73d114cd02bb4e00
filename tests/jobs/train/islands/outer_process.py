"""A real outer server in a process of its own, and islands of it in threads: what the protocol tests share."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tigerbot_jobs.train.islands.client import Answer, Client
from tigerbot_jobs.train.islands.layout import Piece
from tigerbot_jobs.train.islands.quantise import quantise
from tigerbot_jobs.train.islands.server import SECRET

SIZES = {"b.weight": 700, "a.bias": 10}
WHOLE = [Piece("a.bias", 0, 10), Piece("b.weight", 0, 700)]
VALUES = 710
TEST_SECRET = "the islands' own"


class OuterProcess:
    """Started at once; `kill` and `start` again keep folder and port."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder, self._settings = folder, settings
        self.start()

    def start(self) -> None:
        words = ["-m", "tigerbot_jobs.train.islands.server", str(self.folder), self.address, json.dumps(self._settings)]
        self.process = subprocess.Popen([sys.executable, *words], env=os.environ | {SECRET: TEST_SECRET})
        host, _, port = self.address.partition(":")
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                socket.create_connection((host, int(port)), timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None, "the server ended"
                time.sleep(0.02)
        raise TimeoutError("the server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def rounds(self) -> list[dict[str, Any]]:
        path = self.folder / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Rank:
    """One rank of an island, whole or not; calls that wait run in a thread."""

    def __init__(self, server: OuterProcess, island: int, *, rank: int = 0, pieces: list[Piece] | None = None) -> None:
        self.client = Client(server.address, TEST_SECRET, island=island, rank=rank, incarnation=f"life-{island}")
        self.pieces = WHOLE if pieces is None else pieces
        self.numel = sum(piece.numel for piece in self.pieces)
        self.base, self.round = np.zeros(self.numel, np.float32), 0
        self._thread = ThreadPoolExecutor(max_workers=1)

    def join(self, value: float = 0.0) -> Future[Answer]:
        return self._thread.submit(self._join, value)

    def bring(self, value: float | np.ndarray, *, step: int = 20, patience_s: float = 30.0) -> Future[Answer]:
        return self._thread.submit(self._bring, value, step, patience_s)

    def _join(self, value: float) -> Answer:
        values = np.full(self.numel, value, np.float32)
        return self._took(self.client.join(SIZES, self.pieces, values, patience_s=30))

    def _bring(self, value: float | np.ndarray, step: int, patience_s: float) -> Answer:
        delta = quantise(np.broadcast_to(np.float32(value), self.numel).copy())
        answer = self.client.exchange(
            self.round, step, self.pieces, delta, self.base, patience_s=patience_s, reach_s=patience_s
        )
        return self._took(answer)

    def _took(self, answer: Answer) -> Answer:
        self.base, self.round = answer.weights, answer.round
        return answer


def joined(*ranks: Rank, value: float = 0.0) -> list[Answer]:
    """All of them, joined together."""
    return [future.result(30) for future in [rank.join(value) for rank in ranks]]

"""Two real gloo peers, one of which is killed or stopped: what the other one is told."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tigerbot_jobs.train.watch.bugs import describe, is_communication_error

TIMEOUT_S = 2.0


def peer(rank: int, folder: str) -> None:
    """All-reduce until the group breaks; rank 0 writes what it was told."""
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT_S))
    Path(folder, f"pid-{rank}").write_text(str(os.getpid()))
    try:
        for _ in range(100_000):
            dist.all_reduce(torch.ones(1000))
            time.sleep(0.001)
    except Exception as error:
        key, line = describe(error, step=3)
        Path(folder, f"said-{rank}").write_text(f"{is_communication_error(error)}\n{key.exception}\n{line}")


def what_the_survivor_hears(folder: Path, sign: signal.Signals) -> tuple[bool, str, str]:
    """Whether it was taken for a communication error, its type, and its line."""
    peers = mp.get_context("spawn")
    processes = [peers.Process(target=peer, args=(rank, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        _appears(folder / "pid-1", 60)
        time.sleep(0.3)
        os.kill(processes[1].pid or 0, sign)
        _appears(folder / "said-0", 60)
        time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.join()
    verdict, kind, line = (folder / "said-0").read_text().split("\n", 2)
    return verdict == "True", kind, line


def _appears(path: Path, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not path.exists() or not path.read_text():
        assert time.monotonic() < until, f"no {path.name}"
        time.sleep(0.02)

"""Loading a checkpoint and the first step after it: ours beside DeepSpeed's own `load_checkpoint`, from one disk.

Both are timed from a built engine to the end of the first optimizer step, on two ranks, the slower rank counting.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.harness import Row, ratio
from benchmarks.ranks import on_two_ranks, results, stock_engine
from tigerbot.models import build
from tigerbot.spec import TrainLoop
from tigerbot.storage import open_store
from tigerbot.tokens import Batch
from tigerbot_jobs.train.checkpoint import Checkpoints, Header
from tigerbot_jobs.train.data import BatchPlan
from tigerbot_jobs.train.engine import Engine, connect_ranks, count_labels, trained_module

PRESET, VOCABULARY, LENGTH = "60m", 8192, 64
LOOP = TrainLoop(tokens=1, precision="fp32")


def main() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        on_two_ranks(_prepare, folder)

        def ours() -> float:
            on_two_ranks(resume_ours, folder)
            return results(Path(folder) / "seconds")

        def stock() -> float:
            on_two_ranks(_resume_stock, folder)
            return results(Path(folder) / "seconds")

        # Seconds: the ratio of speeds is stock's time over ours.
        row = ratio(
            "resume: load + first step (speed)",
            lambda: 1 / ours(),
            lambda: 1 / stock(),
            unit="1/s",
            target=">= 1.0",
            pairs=10,
            note=f"`{PRESET}`, ZeRO-2, fp32, 2 ranks, folder on one disk; ours verifies SHA-256, stock verifies nothing",
        )
        return [row]


def _prepare(rank: int, folder: str) -> None:
    keep_ours(rank, folder)
    stock = make_stock()
    stock_step(stock)
    stock.save_checkpoint(f"{folder}/stock", tag="one")


def keep_ours(rank: int, folder: str) -> None:
    """A checkpoint after one step, by any number of ranks."""
    engine = make_ours(rank)
    engine.step(
        [synthetic_batch()] * (2 // dist.get_world_size()),
        lr=1e-4,
        counted_tokens=2 * count_labels([synthetic_batch()]),
    )
    Checkpoints(open_store(folder), "ours", keep=1).save(engine.state(), engine.shard(), _header())


def resume_ours(rank: int, folder: str) -> None:
    engine = make_ours(rank)
    checkpoints = Checkpoints(open_store(folder), "ours", keep=1)
    with _Timed(rank, folder):
        key = checkpoints.latest()
        assert key is not None
        assert checkpoints.restore(key, engine.restore, wanted=engine.shards_read)
        engine.step(
            [synthetic_batch()] * (2 // dist.get_world_size()),
            lr=1e-4,
            counted_tokens=2 * count_labels([synthetic_batch()]),
        )


def _resume_stock(rank: int, folder: str) -> None:
    engine = make_stock()
    with _Timed(rank, folder):
        engine.load_checkpoint(f"{folder}/stock", tag="one")
        stock_step(engine)


class _Timed:
    def __init__(self, rank: int, folder: str) -> None:
        self._rank, self._path = rank, Path(folder) / "seconds"

    def __enter__(self) -> None:
        dist.barrier()
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        dist.barrier()
        if self._rank == 0:
            self._path.write_text(str(time.perf_counter() - self._began))


def make_ours(rank: int) -> Engine:
    connect_ranks(rank, dist.get_world_size(), torch.device("cpu"))
    plan = BatchPlan(sequences=2, micro=1, micro_steps=2 // dist.get_world_size(), steps=10)
    module = trained_module(build(PRESET, VOCABULARY, 1), LOOP, torch.device("cpu"))
    return Engine(module, LOOP, {"zero_stage": 2}, plan, torch.device("cpu"))


def our_step(engine: Engine) -> None:
    """One optimizer step on two sequences, by any number of ranks."""
    mine = [synthetic_batch()] * (2 // dist.get_world_size())
    engine.step(mine, lr=1e-4, counted_tokens=2 * count_labels([synthetic_batch()]))


def make_stock() -> Any:
    return stock_engine(build(PRESET, VOCABULARY, 1), micro=1, micro_steps=1, lr=1e-4)


def stock_step(engine: Any) -> None:
    ids = torch.from_numpy(synthetic_batch().input_ids)
    engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
    engine.step()


def synthetic_batch() -> Batch:
    ids = np.arange(LENGTH, dtype=np.int64)[None] + 100
    places = np.arange(LENGTH, dtype=np.int64)[None]
    return Batch(ids, ids.copy(), places, np.ones_like(ids))


def _header() -> Header:
    return Header(step=1, world_size=dist.get_world_size(), zero_stage=2, spec_hash="x", tokenizer_hash="x", threads=1)

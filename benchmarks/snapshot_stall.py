"""How long a step waits for its state to be safe: our snapshot in shared memory beside DeepSpeed's `save_checkpoint`.

Both write into /dev/shm, in the same two ranks and in turn; the slower rank counts.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.harness import Row, ratio
from benchmarks.ranks import on_two_ranks
from benchmarks.resume import make_ours, make_stock, our_step, stock_step
from tigerbot_jobs.train.memory import SnapshotBuffer

PAIRS = 7


def main() -> list[Row]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        on_two_ranks(_measure, folder)
        found = json.loads((Path(folder) / "seconds").read_text())
    ours, stock = iter(found["ours"]), iter(found["stock"])
    row = ratio(
        "stall per snapshot",
        lambda: next(ours),
        lambda: next(stock),
        unit="ms",
        target="<= 0.12",
        better="lower",
        pairs=PAIRS,
        note=f"`60m`, ZeRO-2, fp32, 2 ranks, {found['mb']:.0f} MB a rank into tmpfs; ours without the peer's copy",
    )
    return [row]


def _measure(rank: int, folder: str) -> None:
    ours, stock = make_ours(rank), make_stock()
    our_step(ours)
    stock_step(stock)
    state = ours.state()
    buffer = SnapshotBuffer.create(Path(folder) / f"rank-{rank}", ours.shard(), state)
    found: dict[str, list[float]] = {"ours": [], "stock": []}
    for pair in range(PAIRS + 1):
        took = {
            "ours": _slower(lambda pair=pair: buffer.write(state, step=pair, generation=0, extra={})),
            "stock": _slower(lambda: stock.save_checkpoint(f"{folder}/stock", tag="one")),
        }
        if rank == 0:
            shutil.rmtree(f"{folder}/stock")
        dist.barrier()
        if pair:  # the first one warms up
            for side, seconds in took.items():
                found[side].append(1e3 * seconds)
    if rank == 0:
        megabytes = sum(tensor.numel() * 4 for tensor in state.values()) / 1e6
        (Path(folder) / "seconds").write_text(json.dumps(found | {"mb": megabytes}))


def _slower(work: Callable[[], object]) -> float:
    dist.barrier()
    began = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - began)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)

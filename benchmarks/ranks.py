"""What the training benchmarks share: two gloo ranks on CPUs, a stock DeepSpeed loop, synthetic tokens."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD_SIZE = 2


def on_two_ranks(work: Callable[..., None], *args: Any) -> None:
    """`work(rank, *args)` in two fresh processes that form a gloo group, one thread each."""
    on_ranks(WORLD_SIZE, work, *args)


def on_ranks(world_size: int, work: Callable[..., None], *args: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(  # type: ignore[attr-defined]
            _rank, (world_size, work, f"{folder}/meeting", args), nprocs=world_size, start_method="spawn"
        )


def _rank(rank: int, world_size: int, work: Callable[..., None], meeting: str, args: tuple[Any, ...]) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    work(rank, *args)
    dist.destroy_process_group()


def stock_engine(model: Any, *, micro: int, micro_steps: int, lr: float) -> Any:
    """DeepSpeed as its own tutorial sets it up: ZeRO-2, client AdamW."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000},
    }
    adam = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return deepspeed.initialize(model=model, optimizer=adam, config=config, dist_init_required=False)[0]


def results(path: Path) -> float:
    return float(path.read_text())

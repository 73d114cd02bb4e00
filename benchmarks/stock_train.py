"""Stock Ray Train at its best, to be broken: what a careful user gets today without this platform.

A plain `TorchTrainer`: two workers over gloo, DeepSpeed ZeRO-2, the `tiny` preset, checkpoints through
`ray.train.report`, uploaded in the background, at Young's interval from their measured cost, for ever restarted
(`max_failures=-1`), a health check every 0.2 s. Rank 0 writes a line `step seconds life` per optimizer step.

    python -m benchmarks.stock_train FOLDER --steps 1000 --failure-every 60     train
    python -m benchmarks.stock_train FOLDER --kills 3                           train, kill workers, say what it cost
    python -m benchmarks.stock_train FOLDER --minutes 15                        one kill a minute: the seconds lost
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.ranks import WORLD_SIZE, stock_engine
from benchmarks.recovery import Recovery, kill_workers, seconds_lost_to_faults

LENGTH, MICRO, VOCABULARY = 256, 4, 2048
FIRST_CHECKPOINT = 10  # steps after each start; what it costs sets the interval
STEPS_FILE = "steps.txt"
ROOT = Path(__file__).parents[1]
MEMORY = Path("/dev/shm/stock-train")  # checkpoints on their way to storage


def measure_recovery(folder: Path, kills: int = 5, *, failure_every_s: float = 60.0, seed: int = 1) -> list[Recovery]:
    """SIGKILL a random worker that many times, at random moments between two checkpoints; what each one cost."""
    command = _command(folder, failure_every_s)
    try:
        return kill_workers(command, folder / STEPS_FILE, kills=kills, seed=seed, cwd=ROOT)
    finally:
        shutil.rmtree(MEMORY, ignore_errors=True)


def measure_lost_seconds(folder: Path, minutes: float, *, fault_every_s: float = 60.0, seed: int = 1) -> float:
    """Seconds without new steps while a worker is killed at a random moment of every interval."""
    command = _command(folder, fault_every_s)
    try:
        return seconds_lost_to_faults(
            command, folder / STEPS_FILE, minutes=minutes, fault_every_s=fault_every_s, seed=seed, cwd=ROOT
        )
    finally:
        shutil.rmtree(MEMORY, ignore_errors=True)


def _command(folder: Path, failure_every_s: float) -> list[str]:
    words = ["-m", "benchmarks.stock_train", str(folder.absolute()), "--failure-every", str(failure_every_s)]
    return [sys.executable, *words]


def train(folder: Path, steps: int, failure_every_s: float) -> None:
    """Run to the end, whatever is done to the workers."""
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    folder.mkdir(parents=True, exist_ok=True)
    ray.init(address="local", num_cpus=WORLD_SIZE + 1, include_dashboard=False, object_store_memory=200_000_000)
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"folder": str(folder.absolute()), "steps": steps, "failure_every_s": failure_every_s},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=WORLD_SIZE),
        run_config=RunConfig(
            name="stock",
            storage_path=str(folder.absolute()),
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    trainer.fit()
    ray.shutdown()


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import torch.distributed as dist

    from tigerbot.models import build

    rank = ray.train.get_context().get_world_rank()
    engine = stock_engine(build("tiny", VOCABULARY, 1), micro=MICRO, micro_steps=1, lr=3e-4)
    mine = MEMORY / str(rank)
    shutil.rmtree(mine, ignore_errors=True)  # what an earlier life was uploading when it died
    mine.mkdir(parents=True)
    done = 0
    if kept := ray.train.get_checkpoint():
        with kept.as_directory() as saved:
            engine.load_checkpoint(saved, tag="state")
        done = int(engine.global_steps)
    next_checkpoint, began = done + FIRST_CHECKPOINT, 0.0
    with open(Path(config["folder"]) / STEPS_FILE, "a", buffering=1) as log:
        for step in range(done + 1, config["steps"] + 1):
            if step == done + FIRST_CHECKPOINT // 2:
                began = time.perf_counter()
            _step(engine, step, rank)
            if rank == 0:
                log.write(f"{step} {time.time():.4f} {os.getpid()}\n")
            if step == next_checkpoint:
                step_s = (time.perf_counter() - began) / (FIRST_CHECKPOINT // 2 + 1)
                cost_s = _checkpoint(engine, step, mine)
                if step == done + FIRST_CHECKPOINT:
                    measured = torch.tensor([cost_s, step_s])
                    dist.all_reduce(measured, dist.ReduceOp.MAX)
                    cost_s, step_s = measured.tolist()
                    every = max(1, round(math.sqrt(2 * cost_s * config["failure_every_s"]) / step_s))
                    if rank == 0:
                        print(f"a checkpoint blocks for {cost_s:.3f} s, a step {step_s:.3f} s: one every {every} steps")
                next_checkpoint = step + every


def _step(engine: Any, step: int, rank: int) -> None:
    chance = torch.Generator().manual_seed(step * WORLD_SIZE + rank)
    ids = torch.randint(0, VOCABULARY, (MICRO, LENGTH), generator=chance)
    with torch.autocast("cpu", torch.bfloat16):
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss)
    engine.step()


def _checkpoint(engine: Any, step: int, memory: Path) -> float:
    """Seconds that training stood still."""
    import ray.train
    from ray.train import Checkpoint
    from ray.train.v2.api.report_config import CheckpointUploadMode

    began = time.perf_counter()
    folder = tempfile.mkdtemp(dir=memory)
    engine.save_checkpoint(folder, tag="state")
    kept = Checkpoint.from_directory(folder)
    ray.train.report({"step": step}, checkpoint=kept, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--failure-every", type=float, default=60.0, help="mean seconds between failures, for Young")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0.0)
    asked = parser.parse_args()
    if asked.kills:
        measure_recovery(asked.folder, asked.kills, failure_every_s=asked.failure_every)
    elif asked.minutes:
        lost_s = measure_lost_seconds(asked.folder, asked.minutes, fault_every_s=asked.failure_every)
        print(f"  {lost_s:.1f} of {asked.minutes * 60:.0f} s lost")
    else:
        train(asked.folder, asked.steps, asked.failure_every)


if __name__ == "__main__":
    main()

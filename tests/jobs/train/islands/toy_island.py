"""One rank of an island whose model is 710 numbers that are pulled to a target: the rounds without DeepSpeed.

    python toy_island.py '{"address": ..., "island": 0, "rank": 0, "world_size": 1, ...}'

It keeps `<folder>/island-<i>-rank-<r>.npz` after every step (its weights and step, as a checkpoint) and goes on from it.
With a `gate` it begins when that file is there: a standby.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tigerbot.spec import Islands
from tigerbot_jobs.train.islands.sync import Outer
from tigerbot_jobs.train.shard import Slice

PARAMETERS = {"a.bias": (10,), "b.weight": (70, 10)}
SIZE = 710


class Toy:
    """Sharded as ZeRO shards: one flat vector, cut in equal parts; whole on every rank at stage 0."""

    def __init__(self, rank: int, world_size: int, stage: int) -> None:
        self.device, self.zero_stage, self.step_count = torch.device("cpu"), stage, 0
        part = -(-SIZE // world_size)
        self._begin, self._end = (0, SIZE) if stage == 0 else (rank * part, min(SIZE, (rank + 1) * part))
        self.master = torch.zeros(self._end - self._begin)

    def slices(self) -> list[Slice]:
        found, at = [], 0
        for name, shape in PARAMETERS.items():
            numel = int(np.prod(shape))
            begin, end = max(at, self._begin), min(at + numel, self._end)
            if begin < end:
                found.append(Slice(name, shape, begin - at, end - begin, 0, begin - self._begin))
            at += numel
        return found

    def state(self) -> dict[str, torch.Tensor]:
        return {"0.master": self.master}

    def settle(self, *, step: int) -> None:
        self.step_count = step
        dist.barrier()

    def step(self, target: float) -> None:
        self.master += 0.05 * (target - self.master)
        self.step_count += 1


def main() -> None:
    given = json.loads(sys.argv[1])
    rank, world_size, folder = given["rank"], given["world_size"], Path(given["folder"])
    torch.set_num_threads(1)
    while not Path(given.get("gate", folder)).exists():
        time.sleep(0.02)
    dist.init_process_group("gloo", init_method=f"file://{given['meeting']}", rank=rank, world_size=world_size)
    engine = Toy(rank, world_size, given.get("stage", 2))
    kept = folder / f"island-{given['island']}-rank-{rank}.npz"
    if kept.exists():
        found = np.load(kept)
        engine.master.copy_(torch.from_numpy(found["master"]))
        engine.step_count = int(found["step"])
    islands = Islands(count=2, member=given["island"], every=given["every"], **given.get("islands", {}))
    outer = Outer(islands, given["address"], os.environ["TIGER_ISLANDS_SECRET"], steps=given["steps"])
    engine.step_count = outer.join(engine, engine.step_count)
    log = (folder / f"island-{given['island']}-rank-{rank}.steps").open("a", buffering=1)
    log.write(f"joined {engine.step_count} {time.time()}\n")
    while engine.step_count < given["steps"]:
        time.sleep(given.get("step_s", 0.0))
        engine.step(given["target"])
        outer.after_step(engine, engine.step_count)
        staged = kept.with_name(f".{kept.name}")
        with staged.open("wb") as file:
            np.savez(file, master=engine.master.numpy(), step=engine.step_count)
        staged.replace(kept)
        log.write(f"step {engine.step_count} {time.time()}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

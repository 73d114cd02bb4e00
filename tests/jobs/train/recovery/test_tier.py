"""What a rank under the hub puts into shared memory is all that a state is, and not the tensors alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tigerbot.spec.train import FaultTolerance
from tigerbot_jobs.train.keeping import Progress
from tigerbot_jobs.train.memory import read_snapshots
from tigerbot_jobs.train.recovery.messages import Form
from tigerbot_jobs.train.recovery.tier import Tier
from tigerbot_jobs.train.shard import ShardMeta, Slice


class HalfPrecision:
    """An engine in fp16, as far as a tier looks at it. `scale` is its loss scale."""

    zero_stage = 2

    def __init__(self) -> None:
        self.scale = 2.0**16

    def state(self) -> dict[str, Tensor]:
        return {"0.master": torch.arange(8.0), "0.step": torch.ones(1)}

    def shard(self, *, generation: int, extra: dict[str, Any]) -> ShardMeta:
        slices = (Slice("w", (8,), 0, 8, 0, 0),)
        return ShardMeta(0, 0, 1, 2, generation, slices, {"loss_scale": {"cur_scale": self.scale}} | extra)


def test_every_snapshot_keeps_the_engines_counters_beside_the_runs_progress(tmp_path: Path) -> None:
    prepared: Any = SimpleNamespace(job=SimpleNamespace(spec=SimpleNamespace(fault_tolerance=FaultTolerance())))
    engine: Any = HalfPrecision()
    tier = Tier(prepared, Form(3, 0, 1, "none", 0), SimpleNamespace(), tmp_path, "w", "n")  # type: ignore[arg-type]

    tier.snapshot(engine, Progress(4, voided=(2,)), save=False)
    engine.scale = 2.0**14
    tier.snapshot(engine, Progress(5, voided=(2,)), save=False)

    metas = [one.shard().meta for one in read_snapshots(tmp_path / "worker-w.3")]
    assert [(meta.step, meta.extra["loss_scale"]["cur_scale"]) for meta in metas] == [(5, 2.0**14), (4, 2.0**16)]
    assert all(meta.extra["voided"] == [2] for meta in metas)

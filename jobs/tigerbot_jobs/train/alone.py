"""A rank without a hub: state straight into storage, rows into a file. Short runs, sweeps' trials, tests and benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tigerbot_jobs.train.data import plan_batches
from tigerbot_jobs.train.engine import (
    Engine,
    connect_ranks,
)
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.keeping import Progress
from tigerbot_jobs.train.loop import RankRun
from tigerbot_jobs.train.metrics import Row, append_row
from tigerbot_jobs.train.prepared import Prepared, make_engine

_SAVE_SHARE = 0.03  # of the time may go into checkpoints when their interval is `auto`
_SAVE_FLOOR_S = 30.0


def train_rank(
    job: WorkerJob,
    rank: int,
    world_size: int,
    device: torch.device,
    *,
    on_row: Callable[[Row], None] | None = None,
    keep_model: bool = True,
    on_saved: Callable[[], None] | None = None,
) -> None:
    """Train as one rank of a process group that exists, without a hub; rank 0 hands every logged row to `on_row`.

    Where no model is kept, checkpoints are only for somebody who takes them when told that there is a new one.
    """
    connect_ranks(rank, world_size, device)
    prepared = Prepared(job, device, verify=rank == 0)
    plan = plan_batches(job.spec, world_size)
    told = _File(Path(job.folder) / "metrics.jsonl", on_row)
    engine = make_engine(prepared, plan, fresh=True, on_phase=None)
    keep = _Storage(prepared, keep_model, plan.steps, on_saved)
    run = RankRun(prepared, engine, plan, keep, told, None)
    run.train()
    if keep_model:
        run.finish()


class _File:
    """Rows to a file, and to a callable; nobody else is told."""

    def __init__(self, path: Path, on_row: Callable[[Row], None] | None) -> None:
        self._path, self._on_row = path, on_row

    def phase(self, phase: str, step: int) -> None:
        pass

    def step_done(self, row: list[float], own_s: float) -> None:
        pass

    def say(self, kind: str, **about: Any) -> None:
        pass

    def paused(self) -> bool:
        return False

    def after_step(self) -> None:
        pass

    def log(self, row: Row) -> None:
        append_row(self._path, row)
        if self._on_row is not None:
            self._on_row(row)


class _Storage:
    """State straight into storage, every rank its own, while training waits. Short runs, and those that keep nothing."""

    def __init__(
        self, prepared: Prepared, keeps_model: bool, steps: int, on_saved: Callable[[], None] | None = None
    ) -> None:
        spec = prepared.job.spec
        self._prepared, self._tolerance, self._on_saved = prepared, spec.fault_tolerance, on_saved
        self._keeps = keeps_model or on_saved is not None
        self._useless = None if keeps_model else steps  # the last step's state, where nothing comes after it
        self._saved_at, self._every_s = time.monotonic(), _SAVE_FLOOR_S

    def restore(self, engine: Engine) -> Progress:
        return self._prepared.restored(engine) if self._keeps else Progress(0)

    def due(self, step: int) -> bool:
        return False

    def save_due(self, step: int) -> bool:
        if not self._keeps:
            return False
        if self._tolerance.checkpoint_every_steps:
            return step % self._tolerance.checkpoint_every_steps == 0
        every = self._tolerance.checkpoint_every_s
        return time.monotonic() - self._saved_at >= (self._every_s if every == "auto" else every)

    def snapshot(self, engine: Engine, progress: Progress, *, save: bool) -> None:
        if save and self._keeps and progress.step != self._useless:
            header = self._prepared.header(engine, progress.step, dist.get_world_size())
            meta = replace(engine.shard(extra=progress.as_extra()), step=progress.step)
            took = self._prepared.checkpoints().save(engine.state(), meta, header)
            self._every_s = max(_SAVE_FLOOR_S, took / _SAVE_SHARE)
            self._saved_at = time.monotonic()
            if self._on_saved is not None:
                self._on_saved()

    def rewind(self, engine: Engine, at_most: int) -> Progress | None:
        return None

"""The training loop, on every rank. It reads as the run goes: restore, step, log, validate, keep, finish."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tigerbot.errors import IdentityError
from tigerbot.models import load_tokenizer, tokenizer_hash
from tigerbot.runs import write_json
from tigerbot.spec import TrainSpec
from tigerbot.storage import open_store
from tigerbot_jobs.train.checkpoint import Checkpoints, Header
from tigerbot_jobs.train.data import BatchPlan, TrainingData, plan_batches
from tigerbot_jobs.train.engine import Engine, connect_ranks, count_labels, flops_per_token, peak_flops
from tigerbot_jobs.train.islands.sync import outer_of
from tigerbot_jobs.train.metrics import Row, append_row
from tigerbot_jobs.train.model import base_folder, make_model, tokenizer_folder
from tigerbot_jobs.train.schedule import learning_rate

_SAVE_SHARE = 0.03  # of the time may go into checkpoints when their interval is `auto`
_SAVE_FLOOR_S = 30.0


@dataclass(frozen=True)
class WorkerJob:
    """What every rank is given."""

    spec: TrainSpec
    hash: str
    folder: str
    train: list[tuple[Path, float]]
    validation: list[Path]
    threads: int


def train_worker(job: WorkerJob) -> None:
    """A rank's whole life under Ray Train."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    train_rank(job, context.get_world_rank(), context.get_world_size(), get_device())


def train_rank(
    job: WorkerJob,
    rank: int,
    world_size: int,
    device: torch.device,
    *,
    on_row: Callable[[Row], None] | None = None,
    keep_model: bool = True,
) -> None:
    """Train as one rank of a process group that exists; rank 0 hands every logged row to `on_row`."""
    torch.set_num_threads(job.threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    # Deterministic mode also fills every fresh tensor with NaN to show bugs: a tenth of a small model's step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    connect_ranks(rank, world_size, device)
    plan = plan_batches(job.spec, world_size)
    run = _RankRun(job, plan, rank, world_size, device, on_row)
    run.train()
    if keep_model:
        run.finish()


class _RankRun:
    """One rank of one run: engine, data, checkpoints, and how far it is."""

    def __init__(
        self,
        job: WorkerJob,
        plan: BatchPlan,
        rank: int,
        world_size: int,
        device: torch.device,
        on_row: Callable[[Row], None] | None,
    ) -> None:
        spec = job.spec
        self._job, self._spec, self._plan, self._rank = job, spec, plan, rank
        self._on_row = on_row
        self._world_size, self._device = world_size, device
        self._tokenizer = tokenizer_folder(spec.model)
        self._tokenizer_hash = tokenizer_hash(self._tokenizer)
        self._data = TrainingData(
            job.train,
            job.validation,
            plan=plan,
            sequence_length=spec.data.sequence_length,
            tokenizer_hash=self._tokenizer_hash,
            seed=spec.train.seed,
            rank=rank,
            world_size=world_size,
        )
        self._engine = Engine(make_model(spec), spec.train, spec.deepspeed, plan, device)
        self._checkpoints = Checkpoints(
            open_store(spec.storage.uri), f"{spec.name}/checkpoints", keep=spec.storage.keep
        )
        self._metrics = Path(job.folder) / "metrics.jsonl"
        self._peak = peak_flops(device, self._engine.precision) * world_size
        self._flops = flops_per_token(self._engine.model, spec.data.sequence_length)
        self._step = self._restore()
        self._outer = outer_of(spec, plan.steps)
        if self._outer is not None:
            self._step = self._outer.join(self._engine, self._step)
        self._saved_at, self._save_every_s = time.monotonic(), _SAVE_FLOOR_S
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)
        self._logged_at, self._logged_step = time.monotonic(), self._step

    def train(self) -> None:
        loop, steps = self._spec.train, self._plan.steps
        while self._step < steps:
            # What a step draws (dropout) depends on the step and the rank alone: no generator's state is kept.
            torch.manual_seed(hash((loop.seed, self._step, self._rank)) & 0x7FFFFFFF)
            batches = self._data.micro_batches(self._step)
            counted, save = self._agree(count_labels(batches))
            lr = learning_rate(self._step, steps, loop)
            self._loss[0] += self._engine.step(batches, lr=lr, counted_tokens=counted)
            self._loss[1] += counted
            self._step += 1
            if self._outer is not None:
                self._outer.after_step(self._engine, self._step)
            self._report(lr)
            if save and self._step < steps:
                self._save()

    def finish(self) -> None:
        """Keep the last state, write the model and its numbers."""
        self._save()
        folder = Path(self._job.folder)
        self._engine.save(load_tokenizer(self._tokenizer), folder / "model", base_folder(self._spec))
        if self._rank == 0:
            write_json(folder / "trained.json", {"steps": self._step, "tokens": self._tokens(self._step)})
            self._publish(folder)
        dist.barrier()

    def _publish(self, folder: Path) -> None:
        """Where storage is a bucket, the model goes there too: rank 0's node may not be the driver's."""
        uri = self._spec.storage.uri
        if uri.startswith("s3://"):
            open_store(uri).commit_folder(folder / "model", f"{self._spec.name}/model")
            for name in ("metrics.jsonl", "trained.json"):
                open_store(uri).put_file(folder / name, f"{self._spec.name}/{name}")

    def _restore(self) -> int:
        key = self._checkpoints.latest()
        if key is None:
            return 0
        header = self._checkpoints.header(key)
        ours = {
            "world_size": self._world_size,
            "zero_stage": self._engine.zero_stage,
            "spec_hash": self._job.hash,
            "tokenizer_hash": self._tokenizer_hash,
        }
        for field, value in ours.items():
            if getattr(header, field) != value:
                raise IdentityError(
                    f"{field} was {getattr(header, field)}, now it is {value}",
                    where=f"checkpoint {key}",
                    fix="resume it as it was, or --replace to begin anew",
                )
        state = self._checkpoints.load(key, replicated=self._engine.zero_stage == 0)
        self._engine.restore(state, step=header.step)
        return header.step

    def _agree(self, counted: int) -> tuple[int, bool]:
        """Labels over all ranks, and rank 0's decision whether this step ends with a checkpoint."""
        due = self._rank == 0 and self._save_is_due()
        shared = torch.tensor([counted, int(due)], dtype=torch.int64, device=self._device)
        dist.all_reduce(shared)
        return int(shared[0]), bool(shared[1])

    def _save_is_due(self) -> bool:
        tolerance = self._spec.fault_tolerance
        if tolerance.checkpoint_every_steps:
            return (self._step + 1) % tolerance.checkpoint_every_steps == 0
        every = tolerance.checkpoint_every_s
        return time.monotonic() - self._saved_at >= (self._save_every_s if every == "auto" else every)

    def _save(self) -> None:
        header = Header(
            step=self._step,
            world_size=self._world_size,
            zero_stage=self._engine.zero_stage,
            spec_hash=self._job.hash,
            tokenizer_hash=self._tokenizer_hash,
            threads=self._job.threads,
        )
        took = self._checkpoints.save(self._engine.state(), header, replicated=self._engine.zero_stage == 0)
        self._save_every_s = max(_SAVE_FLOOR_S, took / _SAVE_SHARE)
        self._saved_at = time.monotonic()

    def _report(self, lr: float) -> None:
        """Log every few steps, and the held-out loss every few more."""
        loop, last = self._spec.train, self._step == self._plan.steps
        validate = bool(self._job.validation) and (last or self._step % loop.validate_every == 0)
        if not (last or validate or self._step % loop.log_every == 0):
            return
        loss = self._loss.clone()
        dist.all_reduce(loss[:1])
        row = {"step": self._step, "loss": float(loss[0] / loss[1].clamp(min=1)), "lr": lr}
        row |= {"grad_norm": self._engine.grad_norm, "tokens": self._tokens(self._step)} | self._throughput()
        if validate:
            held_out = self._engine.loss(self._data.validation_batches())
            dist.all_reduce(held_out)
            row["validation_loss"] = float(held_out[0] / held_out[1].clamp(min=1))
        if self._rank == 0:
            append_row(self._metrics, row)
            if self._on_row is not None:
                self._on_row(row)
        self._loss.zero_()
        self._logged_at, self._logged_step = time.monotonic(), self._step

    def _throughput(self) -> dict[str, float]:
        seconds = time.monotonic() - self._logged_at
        rate = self._tokens(self._step - self._logged_step) / max(seconds, 1e-9)
        return {"tokens_per_second": rate, "mfu": rate * self._flops / self._peak}

    def _tokens(self, steps: int) -> int:
        return steps * self._plan.sequences * self._spec.data.sequence_length


def threads_of(spec: TrainSpec, workers: int) -> int:
    """Threads of a worker: as the spec says, else an equal part of this machine's cores."""
    return spec.scale.threads_per_worker or max(1, (os.cpu_count() or 1) // workers)

"""The training loop of one rank in one process group. It reads as the run goes: restore, step, look, keep, finish.

Where state is kept is the `Keep` it is given, and who is told what it does is the `Told`: a run of its own has simple ones
(`train_rank`), a rank under the hub has those of the room `recovery`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from tigerbot.errors import CorruptError, IdentityError
from tigerbot.models import load_tokenizer, tokenizer_hash
from tigerbot.runs import write_json
from tigerbot.spec import TrainSpec
from tigerbot.storage import open_store
from tigerbot.tokens import Batch
from tigerbot_jobs.train.checkpoint import Checkpoints, Header
from tigerbot_jobs.train.data import BatchPlan, TrainingData, plan_batches
from tigerbot_jobs.train.engine import (
    Engine,
    connect_ranks,
    count_labels,
    flops_per_token,
    peak_flops,
    trained_module,
)
from tigerbot_jobs.train.islands.sync import outer_of
from tigerbot_jobs.train.metrics import Row, append_row
from tigerbot_jobs.train.model import LanguageModel, base_folder, make_model, tokenizer_folder
from tigerbot_jobs.train.reshard import Read
from tigerbot_jobs.train.schedule import learning_rate
from tigerbot_jobs.train.shard import ShardMeta
from tigerbot_jobs.train.watch.checksums import vote
from tigerbot_jobs.train.watch.guard import LossGuard, Rollback, Skip, Stop, newest

Why = Literal["done", "pause", "rollback", "stop"]
_SAVE_SHARE = 0.03  # of the time may go into checkpoints when their interval is `auto`
_SAVE_FLOOR_S = 30.0
_REPLICAS_EVERY = 200  # steps: at 5 GB/s a thousandth of the time
_ROWS_KEPT = 32  # more than a heartbeat has between two


@dataclass(frozen=True)
class WorkerJob:
    """What every rank is given. `hub` and `token` are empty where a rank has no hub."""

    spec: TrainSpec
    hash: str
    folder: str
    train: list[tuple[Path, float]]
    validation: list[Path]
    threads: int
    hub: str = ""
    token: str = ""
    run_id: str = ""


@dataclass(frozen=True)
class Progress:
    """What a state knows beside the weights.

    `voided` steps were taken back and count without an update. `rows` are the last ones logged: whoever was to hand them
    on may have died with the steps they tell of.
    """

    step: int
    voided: tuple[int, ...] = ()
    guard: dict[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    def as_extra(self) -> dict[str, Any]:
        return {"voided": list(self.voided), "guard": self.guard, "rows": list(self.rows)}

    @classmethod
    def of(cls, step: int, extra: dict[str, Any]) -> Progress:
        return cls(step, tuple(extra.get("voided", ())), dict(extra.get("guard", {})), tuple(extra.get("rows", ())))


@dataclass(frozen=True)
class Outcome:
    """Why a rank left the loop, and what the hub needs to know."""

    why: Why
    step: int
    text: str = ""
    rollback: Rollback | None = None


class Keep(Protocol):
    """Where a rank's state goes and comes from. Methods marked collective are called by every rank."""

    def restore(self, engine: Engine) -> Progress:
        """Collective. Put back what there is; step 0 where there is nothing."""
        ...

    def due(self, step: int) -> bool:
        """On rank 0: whether the state after `step` goes into memory."""
        ...

    def save_due(self, step: int) -> bool:
        """On rank 0: whether the state after `step` goes into storage."""
        ...

    def snapshot(self, engine: Engine, progress: Progress, *, save: bool) -> None:
        """Collective. Keep the state in memory, and with `save` in storage too."""
        ...

    def rewind(self, engine: Engine, at_most: int) -> Progress | None:
        """Collective. Back to a state in memory of at most this step; None where there is none."""
        ...


class Told(Protocol):
    """Who is told what a rank does."""

    def phase(self, phase: str, step: int) -> None: ...

    def step_done(self, row: list[float], own_s: float) -> None: ...

    def log(self, row: Row) -> None: ...

    def say(self, kind: str, **about: Any) -> None: ...

    def paused(self) -> bool:
        """Whether the rank is to leave at the next step boundary."""
        ...

    def after_step(self) -> None:
        """At a step boundary: time for what somebody asked for."""
        ...


class Prepared:
    """What a process has ready before it has a rank, and keeps from one process group to the next."""

    def __init__(self, job: WorkerJob, device: torch.device, *, verify: bool) -> None:
        torch.set_num_threads(job.threads)
        torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
        # Deterministic mode also fills every fresh tensor with NaN to show bugs: a tenth of a small model's step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        spec = job.spec
        self.job, self.device = job, device
        self.tokenizer = tokenizer_folder(spec.model)
        self.tokenizer_hash = tokenizer_hash(self.tokenizer)
        self.data = TrainingData(
            job.train,
            job.validation,
            sequence_length=spec.data.sequence_length,
            tokenizer_hash=self.tokenizer_hash,
            seed=spec.train.seed,
            verify=verify,
        )
        self.say: Callable[[str], None] = print
        self._module: LanguageModel | None = None
        self._peak = 0.0

    def module(self, *, fresh: bool) -> LanguageModel:
        """The model: the one there is, or as the seed makes it. ZeRO 3 cuts a module's weights up for good."""
        if fresh or self._module is None:
            self._module = trained_module(make_model(self.job.spec), self.job.spec.train, self.device)
        return self._module

    def forget_module(self) -> None:
        self._module = None

    def peak_flops(self, precision: str) -> float:
        """Of one rank, measured once."""
        self._peak = self._peak or peak_flops(self.device, precision)
        return self._peak

    def header(self, engine: Engine, step: int, world_size: int, generation: int = 0) -> Header:
        """What a checkpoint of this run says of itself."""
        about = (self.job.hash, self.tokenizer_hash, self.job.threads, generation)
        return Header(step, world_size, engine.zero_stage, *about)

    def restored(self, engine: Engine) -> Progress:
        """Collective. Put in the newest checkpoint in storage that is whole; step 0 where there never was one.

        Raises:
            IdentityError: it is of another spec or tokenizer.
            CorruptError: there are some, and all are damaged.
        """
        checkpoints, damaged = self.checkpoints(), None
        while (key := checkpoints.latest()) is not None:
            header = checkpoints.header(key)
            self._check_identity(key, header)
            kept: list[dict[str, Any]] = []

            def put(shards: list[ShardMeta], read: Read, kept: list[dict[str, Any]] = kept) -> None:
                engine.restore(shards, read)
                kept.append(shards[0].extra)

            if checkpoints.restore(key, put, wanted=engine.shards_read):
                return Progress.of(header.step, kept[0])
            damaged = key
        if damaged is not None:
            raise CorruptError("no whole checkpoint is left", where=damaged, fix="--replace begins anew")
        return Progress(0)

    def checkpoints(self) -> Checkpoints:
        spec = self.job.spec
        prefix, keep = f"{spec.name}/checkpoints", spec.storage.keep
        return Checkpoints(open_store(spec.storage.uri), prefix, keep=keep, say=self.say)

    def _check_identity(self, key: str, header: Header) -> None:
        for name, value in {"spec_hash": self.job.hash, "tokenizer_hash": self.tokenizer_hash}.items():
            if getattr(header, name) != value:
                raise IdentityError(
                    f"{name} was {getattr(header, name)}, now it is {value}",
                    where=f"checkpoint {key}",
                    fix="resume it as it was, or --replace to begin anew",
                )


class RankRun:
    """One rank of one generation: engine, data, and how far it is."""

    def __init__(
        self,
        prepared: Prepared,
        engine: Engine,
        plan: BatchPlan,
        keep: Keep,
        told: Told,
        guard: LossGuard | None,
    ) -> None:
        self._prepared, self._engine, self._plan, self._keep, self._told = prepared, engine, plan, keep, told
        self._job, self._spec = prepared.job, prepared.job.spec
        self._rank, self._world_size, self._device = dist.get_rank(), dist.get_world_size(), prepared.device
        self._guard = guard
        self._peak = prepared.peak_flops(engine.precision) * self._world_size
        self._flops = flops_per_token(engine.model, self._spec.data.sequence_length)
        told.phase("restore", 0)
        self._rows: list[Row] = []
        self._began_with(keep.restore(engine))
        if self._rank == 0:
            for row in self._rows:
                told.log(row)
        self._outer = outer_of(self._spec, plan.steps)
        if self._outer is not None:
            self.step = self._outer.join(engine, self.step)
        self._logged_at, self._logged_step = time.monotonic(), self.step

    def _began_with(self, progress: Progress) -> None:
        self.step, self._voided = progress.step, set(progress.voided)
        self._agreed_at = progress.step
        self._rows = list(progress.rows)
        if self._guard is not None and progress.guard:
            skips = self._guard.skips  # what the hub says is skipped, it has said since that state was kept
            self._guard.restore(newest([progress.guard, self._guard.state()]), step=progress.step)
            for first, last in skips.intervals:
                self._guard.skips = self._guard.skips.add(first, last)
        self._loss = torch.zeros(2, dtype=torch.float64)
        self._batches: list[Batch] = []
        self._counted = 0

    def train(self) -> Outcome:
        """Steps until the end, or until somebody wants otherwise."""
        self._agree(None)
        while self.step < self._plan.steps:
            began, spent = time.perf_counter(), _Spent()
            loss, lr = self._one_step()
            spent.data_s = self._fetch()
            due, save, pause = self._agree(loss)
            verdict = self._judge(loss)
            if isinstance(verdict, Outcome):
                return verdict
            if verdict == "taken back":
                continue
            if self._outer is not None:
                self._told.phase("save", self.step)  # it waits for other islands, not for ranks
                self._outer.after_step(self._engine, self.step)
            self._loss += torch.tensor([self._global_loss, self._global_counted], dtype=torch.float64)
            last = self.step == self._plan.steps
            spent.eval_s = self._report(lr)  # before the snapshot: what is not logged when it counts never will be
            if due or save or last or pause:
                spent.snapshot_s = self._snapshot(save=save or last)
            self._told.step_done(spent.row(self.step, time.perf_counter() - began, self._tokens(1)), self._engine.own_s)
            self._told.after_step()
            if self.step % _REPLICAS_EVERY == 0 and (odd := self._compare_replicas()) is not None:
                return odd
            if pause and not last:
                return Outcome("pause", self.step)
        return Outcome("done", self.step)

    @property
    def batch(self) -> int:
        """The global batch that the next step takes."""
        return self._guard.skips.data_index(self.step) if self._guard else self.step

    def finish(self) -> None:
        """Write the model and its numbers."""
        self._told.phase("save", self.step)
        folder = Path(self._job.folder)
        self._engine.save(load_tokenizer(self._prepared.tokenizer), folder / "model", base_folder(self._spec))
        if self._rank == 0:
            write_json(folder / "trained.json", {"steps": self.step, "tokens": self._tokens(self.step)})
            _publish(self._spec, folder)
        dist.barrier()

    def _one_step(self) -> tuple[torch.Tensor, float]:
        loop, step = self._spec.train, self.step
        # What a step draws (dropout) depends on the step and the rank alone: no generator's state is kept.
        torch.manual_seed(hash((loop.seed, step, self._rank)) & 0x7FFFFFFF)
        lr = learning_rate(step, self._plan.steps, loop) * (self._guard.lr_factor(step) if self._guard else 1.0)
        loss = self._engine.step(self._batches, lr=lr, counted_tokens=self._counted)
        self._global_counted = self._counted
        self.step += 1
        while self.step in self._voided:
            self.step += 1
        return loss, lr

    def _fetch(self) -> float:
        """Read the next step's batches; the seconds it took."""
        began = time.perf_counter()
        self._told.phase("data", self.step)
        self._batches = []
        if self.step < self._plan.steps:
            self._batches = self._prepared.data.micro_batches(self.batch, self._plan, self._rank, self._world_size)
        return time.perf_counter() - began

    def _agree(self, loss: torch.Tensor | None) -> tuple[bool, bool, bool]:
        """One reduction a step: the loss just made, the next step's labels, and what rank 0 wants to be done now."""
        if loss is None:
            self._fetch()
        self._told.phase("agree", self.step)
        mine = [float(count_labels(self._batches)), float(loss) if loss is not None else 0.0, 0.0, 0.0, 0.0]
        mine[4] = float(self._told.paused())
        if self._rank == 0 and loss is not None:
            mine[2], mine[3] = float(self._keep.due(self.step)), float(self._keep.save_due(self.step))
        shared = torch.tensor(mine, dtype=torch.float64, device=self._device)
        dist.all_reduce(shared)
        counted, self._global_loss, due, save, pause = shared.tolist()
        self._counted = int(counted)
        return due > 0, save > 0, pause > 0

    def _judge(self, loss: torch.Tensor) -> Outcome | str:
        """What the guard says of the step just made; a step that was no number is taken back."""
        if self._guard is None:
            return ""
        at = self.step - 1
        verdict = self._guard.decide(at, self._global_loss / max(self._global_counted, 1), self._engine.grad_norm)
        if isinstance(verdict, Rollback):
            return Outcome("rollback", self.step, verdict.evidence, verdict)
        if isinstance(verdict, Stop):
            return Outcome("stop", self.step, verdict.evidence)
        if not isinstance(verdict, Skip):
            return ""
        if self._rank == 0:
            self._told.say("fault_seen", fault="nan", rank=-1, node="", step=at, evidence=verdict.evidence)
            self._told.say("decision", action="skip", reason=verdict.evidence, budget_left=None)
        before = self._keep.rewind(self._engine, at)
        if before is None:
            return Outcome("stop", self.step, f"{verdict.evidence}, and there is no state from before it")
        state = self._guard.state()
        self._began_with(replace(before, voided=(*sorted({*self._voided, at}),), guard={}))
        self._guard.restore(state, step=at + 1)
        while self.step in self._voided:
            self.step += 1
        self._fetch()
        self._agree(None)
        return "taken back"

    def _compare_replicas(self) -> Outcome | None:
        """Below ZeRO 3 every rank holds the same weights after a step, bit for bit: one that does not has bad memory."""
        if self._guard is None or self._world_size == 1 or self._engine.zero_stage == 3:
            return None
        self._told.phase("agree", self.step)
        found = vote(self._engine.replica_digests())
        if found.agree:
            self._agreed_at = self.step
            return None
        if self._rank == 0:
            rank = found.odd[0] if len(found.odd) == 1 else -1
            self._told.say(
                "fault_seen", fault="corruption", rank=rank, node="", step=self.step, evidence=found.evidence
            )
        back = Rollback(self._agreed_at, (-1, -1), 1.0, found.evidence)
        return Outcome("rollback", self.step, found.evidence, back)

    def _snapshot(self, *, save: bool) -> float:
        began = time.perf_counter()
        self._told.phase("snapshot", self.step)
        guard = self._guard.state() if self._guard else {}
        progress = Progress(self.step, tuple(sorted(self._voided)), guard, tuple(self._rows))
        self._keep.snapshot(self._engine, progress, save=save)
        return time.perf_counter() - began

    def _report(self, lr: float) -> float:
        """Log every few steps, and the held-out loss every few more; the seconds that took."""
        began, loop, last = time.perf_counter(), self._spec.train, self.step == self._plan.steps
        validate = bool(self._job.validation) and (last or self.step % loop.validate_every == 0)
        if not (last or validate or self.step % loop.log_every == 0):
            return 0.0
        row: Row = {"step": self.step, "loss": float(self._loss[0] / self._loss[1].clamp(min=1)), "lr": lr}
        row |= {"grad_norm": self._engine.grad_norm, "tokens": self._tokens(self.step)} | self._throughput()
        if validate:
            self._told.phase("eval", self.step)
            row["validation_loss"] = self._held_out()
        self._rows = [*self._rows[1 - _ROWS_KEPT :], row]
        if self._rank == 0:
            self._told.log(row)
        self._loss.zero_()
        self._logged_at, self._logged_step = time.monotonic(), self.step
        return time.perf_counter() - began if validate else 0.0

    def _held_out(self) -> float:
        batches = self._prepared.data.validation_batches(self._plan.micro, self._rank, self._world_size)
        total = self._engine.loss(batches)
        dist.all_reduce(total)
        return float(total[0] / total[1].clamp(min=1))

    def _throughput(self) -> dict[str, float]:
        seconds = time.monotonic() - self._logged_at
        rate = self._tokens(self.step - self._logged_step) / max(seconds, 1e-9)
        return {"tokens_per_second": rate, "mfu": rate * self._flops / self._peak}

    def _tokens(self, steps: int) -> int:
        return steps * self._plan.sequences * self._spec.data.sequence_length


@dataclass
class _Spent:
    """Where one turn of the loop went."""

    data_s: float = 0.0
    snapshot_s: float = 0.0
    eval_s: float = 0.0

    def row(self, step: int, total_s: float, tokens: int) -> list[float]:
        """A `steps` row of the ledger."""
        seconds = (total_s, self.data_s, self.snapshot_s, 0.0, self.eval_s)
        return [step, *(round(value, 6) for value in seconds), tokens]


def make_engine(prepared: Prepared, plan: BatchPlan, *, fresh: bool, on_phase: Callable[[str], None] | None) -> Engine:
    """An engine in the process group there is."""
    spec = prepared.job.spec
    module = prepared.module(fresh=fresh)
    return Engine(module, spec.train, spec.deepspeed, plan, prepared.device, on_phase=on_phase)


def train_rank(
    job: WorkerJob,
    rank: int,
    world_size: int,
    device: torch.device,
    *,
    on_row: Callable[[Row], None] | None = None,
    keep_model: bool = True,
) -> None:
    """Train as one rank of a process group that exists, without a hub; rank 0 hands every logged row to `on_row`."""
    connect_ranks(rank, world_size, device)
    prepared = Prepared(job, device, verify=rank == 0)
    plan = plan_batches(job.spec, world_size)
    told = _File(Path(job.folder) / "metrics.jsonl", on_row)
    engine = make_engine(prepared, plan, fresh=True, on_phase=None)
    run = RankRun(prepared, engine, plan, _Storage(prepared, keep_model), told, None)
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

    def __init__(self, prepared: Prepared, keeps: bool) -> None:
        spec = prepared.job.spec
        self._prepared, self._keeps, self._tolerance = prepared, keeps, spec.fault_tolerance
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
        if save and self._keeps:
            header = self._prepared.header(engine, progress.step, dist.get_world_size())
            meta = replace(engine.shard(extra=progress.as_extra()), step=progress.step)
            took = self._prepared.checkpoints().save(engine.state(), meta, header)
            self._every_s = max(_SAVE_FLOOR_S, took / _SAVE_SHARE)
            self._saved_at = time.monotonic()

    def rewind(self, engine: Engine, at_most: int) -> Progress | None:
        return None


def _publish(spec: TrainSpec, folder: Path) -> None:
    """Where storage is a bucket, the model goes there too: rank 0's node may not be the driver's."""
    if spec.storage.uri.startswith("s3://"):
        store = open_store(spec.storage.uri)
        store.commit_folder(folder / "model", f"{spec.name}/model")
        store.put_file(folder / "trained.json", f"{spec.name}/trained.json")


def threads_of(spec: TrainSpec, workers: int) -> int:
    """Threads of a worker: as the spec says, else an equal part of this machine's cores."""
    return spec.scale.threads_per_worker or max(1, (os.cpu_count() or 1) // workers)

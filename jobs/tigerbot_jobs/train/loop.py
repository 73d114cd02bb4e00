"""The training loop of one rank in one process group. It reads as the run goes: restore, step, look, keep, finish.

Where state is kept is the `Keep` it is given, and who is told what it does is the `Told`: a rank alone has simple ones
(`alone.py`), a rank under the hub has those of the room `recovery`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from tigerbot.models import load_tokenizer
from tigerbot.runs import write_json
from tigerbot.spec import TrainSpec
from tigerbot.storage import open_store
from tigerbot.tokens import Batch
from tigerbot_jobs.train.data import BatchPlan
from tigerbot_jobs.train.engine import (
    Engine,
    count_labels,
    flops_per_token,
)
from tigerbot_jobs.train.islands.sync import outer_of
from tigerbot_jobs.train.keeping import Keep, Progress, Told
from tigerbot_jobs.train.metrics import Row
from tigerbot_jobs.train.model import base_folder
from tigerbot_jobs.train.prepared import Prepared
from tigerbot_jobs.train.schedule import learning_rate
from tigerbot_jobs.train.watch.checksums import vote
from tigerbot_jobs.train.watch.guard import LossGuard, Rollback, Skip, Stop, newest

Why = Literal["done", "pause", "rollback", "stop"]
_REPLICAS_EVERY = 200  # steps: at 5 GB/s a thousandth of the time
_ROWS_KEPT = 32  # more than a heartbeat has between two


@dataclass(frozen=True)
class Outcome:
    """Why a rank left the loop, and what the hub needs to know."""

    why: Why
    step: int
    text: str = ""
    rollback: Rollback | None = None


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


def _publish(spec: TrainSpec, folder: Path) -> None:
    """Where storage is a bucket, the model goes there too: rank 0's node may not be the driver's."""
    if spec.storage.uri.startswith("s3://"):
        store = open_store(spec.storage.uri)
        store.commit_folder(folder / "model", f"{spec.name}/model")
        store.put_file(folder / "trained.json", f"{spec.name}/trained.json")

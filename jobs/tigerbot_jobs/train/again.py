"""`tiger replay`: one step of a run, done again from a checkpoint and again, and the bits compared.

The ranks are processes of this machine, as many as made the checkpoint, so that the sums are made in the same order. It
trains nothing further and keeps nothing, so that the run may go on meanwhile: a machine in doubt is tried with the work it
was doing.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tigerbot.errors import CorruptError, InputError, TigerError
from tigerbot.runs import Run, read_json
from tigerbot.spec import TrainSpec, parse_spec
from tigerbot.storage import open_store
from tigerbot_jobs.finding import find_record
from tigerbot_jobs.train.checkpoint import Checkpoints, Header, checkpoint_key, read_header
from tigerbot_jobs.train.checks import checked
from tigerbot_jobs.train.data import plan_batches
from tigerbot_jobs.train.engine import Engine, connect_ranks
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.goodput_text import LEDGER
from tigerbot_jobs.train.keeping import Progress
from tigerbot_jobs.train.loop import RankRun
from tigerbot_jobs.train.metrics import Row
from tigerbot_jobs.train.prepared import Prepared, make_engine
from tigerbot_jobs.train.shard import ShardMeta
from tigerbot_jobs.train.watch.checksums import Replay, replay_matches, replica_digest
from tigerbot_jobs.train.watch.guard import LossGuard


@dataclass(frozen=True)
class Replayed:
    """What was done again: the step after the checkpoint's, and what came of it."""

    step: int
    world_size: int
    found: Replay

    def line(self) -> str:
        return f"step {self.step + 1} on {self.world_size} ranks: {self.found.evidence}"


def replay_step(run: str, folder: Path, step: int | None = None) -> Replayed:
    """Do the step after a run's newest checkpoint, or after the newest of at most `step`, again.

    Raises:
        InputError: there is no such run or checkpoint, nothing comes after it, or this machine has too few GPUs.
    """
    job = _job_of(find_record(run, folder, LEDGER, kind="train", what="ledger", begins="the training").parent)
    key, header = _checkpoint(job.spec, step)
    plan = plan_batches(job.spec, header.world_size)
    if header.step >= plan.steps:
        raise InputError(
            f"is the state after the last of {plan.steps} steps", where=key, fix=f"--step {plan.steps - 1} or lower"
        )
    gpus = torch.cuda.device_count() if job.spec.scale.gpus_per_worker else None
    if gpus is not None and gpus < header.world_size:
        raise InputError(f"{header.world_size} ranks made it, here are {gpus} GPUs", where=key, fix="replay it there")
    job = replace(job, threads=header.threads)
    with tempfile.TemporaryDirectory(prefix="replay-") as meeting:
        task = (header.world_size, f"{meeting}/ranks", job, key, gpus is not None, f"{meeting}/found")
        mp.start_processes(_rank, task, nprocs=header.world_size, start_method="spawn")  # type: ignore[attr-defined]
        found = json.loads(Path(f"{meeting}/found").read_text())
    if "type" in found:
        raise CorruptError(found["what"], where=found["where"], fix=found["fix"])
    return Replayed(header.step, header.world_size, Replay(**found))


def replay_rank(job: WorkerJob, key: str, device: torch.device) -> Replay:
    """Collective. The step after the checkpoint `key`, twice or three times, on the process group there is."""
    connect_ranks(dist.get_rank(), dist.get_world_size(), device)
    prepared = Prepared(job, device, verify=False)
    plan = plan_batches(job.spec, dist.get_world_size())
    engine = make_engine(prepared, plan, fresh=True, on_phase=None)
    runs: list[RankRun] = []

    def restore() -> None:
        runs[:] = [RankRun(prepared, engine, plan, _From(prepared.checkpoints(), key), _Nobody(), LossGuard())]

    def run() -> tuple[int, ...]:
        runs[0].train()
        return _digests(engine)

    return replay_matches(run, restore)


def _job_of(folder: Path) -> WorkerJob:
    kept = read_json(folder / "spec.json", {})
    spec = parse_spec(kept["spec"], where=str(folder / "spec.json"))
    assert isinstance(spec, TrainSpec)
    if spec.islands is not None:
        raise InputError(
            "an island's step is of other islands too", where=spec.name, fix="replay a run without islands"
        )
    return checked(Run(spec, kept.get("began_as", kept["hash"]), folder), spec)


def _checkpoint(spec: TrainSpec, step: int | None) -> tuple[str, Header]:
    store, prefix = open_store(spec.storage.uri), f"{spec.name}/checkpoints"
    keys = sorted(store.committed(prefix))
    fit = [key for key in keys if step is None or key <= checkpoint_key(prefix, step)]
    if not fit:
        there = ", ".join(key.rpartition("/")[2] for key in keys) or "none"
        raise InputError("has no such checkpoint", where=store.at(prefix), fix=f"there are: {there}")
    return fit[-1], read_header(store, fit[-1])


def _digests(engine: Engine) -> tuple[int, ...]:
    """Collective. Of every rank's own part of the state: weights, moments and counters, in order of rank."""
    state = engine.state()
    mine = replica_digest(state[name] for name in sorted(state)).reshape(1).to(engine.device)
    found = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return tuple(torch.cat(found).tolist())


def _rank(rank: int, world_size: int, meeting: str, job: WorkerJob, key: str, gpus: bool, found: str) -> None:
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group(
        "nccl" if gpus else "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size
    )
    try:
        said: dict[str, Any] = asdict(replay_rank(job, key, device))
    except TigerError as error:
        said = {"type": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
    if rank == 0:
        Path(found).write_text(json.dumps(said))
    dist.barrier()
    os._exit(0)  # a thread of torch's may abort a process that ends by itself


class _From:
    """State from one checkpoint, read anew each time; nothing is kept."""

    def __init__(self, checkpoints: Checkpoints, key: str) -> None:
        self._checkpoints, self._key = checkpoints, key

    def restore(self, engine: Engine) -> Progress:
        kept: list[ShardMeta] = []

        def put(shards: list[ShardMeta], read: Callable[..., Any]) -> None:
            engine.restore(shards, read)
            kept.append(shards[0])

        if not self._checkpoints.restore(self._key, put, wanted=engine.shards_read):
            raise CorruptError("its bytes are not what was written", where=self._key, fix="replay from another")
        return Progress.of(kept[0].step, kept[0].extra)

    def due(self, step: int) -> bool:
        return False

    def save_due(self, step: int) -> bool:
        return False

    def snapshot(self, engine: Engine, progress: Progress, *, save: bool) -> None:
        pass

    def rewind(self, engine: Engine, at_most: int) -> Progress | None:
        return None


class _Nobody:
    """Nobody is told, and one step is enough."""

    def phase(self, phase: str, step: int) -> None:
        pass

    def step_done(self, row: list[float], own_s: float) -> None:
        pass

    def say(self, kind: str, **about: Any) -> None:
        pass

    def log(self, row: Row) -> None:
        pass

    def paused(self) -> bool:
        return True

    def after_step(self) -> None:
        pass

"""`tiger replay`: a step done again gives the same bits, and a machine that makes others is told of with its rank."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_corpus import Corpus, as_train

from tigerbot.errors import InputError
from tigerbot.runs import Run, open_run
from tigerbot_jobs.train.again import replay_rank, replay_step
from tigerbot_jobs.train.alone import train_rank
from tigerbot_jobs.train.checks import checked
from tigerbot_jobs.train.engine import Engine
from tigerbot_jobs.train.given import WorkerJob


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twelve steps on two ranks, checkpoints among them; as `tiger run` leaves it."""
    storage = tmp_path_factory.mktemp("replayed")
    raw = corpus.spec("replayed", storage) | {"storage": {"uri": str(storage), "keep": 10}}
    raw |= {"scale": {"workers": 2, "threads_per_worker": 1}, "deepspeed": {"zero_stage": 2}}
    opened = open_run(as_train(raw))
    (opened.folder / "ledger.jsonl").touch()
    _on_ranks(2, storage, _train, checked(opened, as_train(raw)))
    opened.close()
    return opened


def _on_ranks(world_size: int, folder: Path, work: Any, *args: Any) -> None:
    task = (world_size, str(folder / "meeting"), work, args)
    mp.start_processes(_rank, task, nprocs=world_size, start_method="spawn")  # type: ignore[attr-defined]
    (folder / "meeting").unlink(missing_ok=True)


def _rank(rank: int, world_size: int, meeting: str, work: Any, args: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    work(rank, *args)
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may abort a process that ends by itself


def _train(rank: int, job: WorkerJob) -> None:
    train_rank(job, rank, dist.get_world_size(), torch.device("cpu"))


def test_a_step_done_again_gives_the_same_bits(run: Run) -> None:
    found = replay_step("replayed", run.folder.parent, step=8)

    assert found.found.matches and found.line() == "step 9 on 2 ranks: the step gave the same bits twice"


def test_a_bit_that_flips_on_one_rank_is_told_with_the_rank(run: Run, tmp_path: Path) -> None:
    job = checked(run, run.spec)  # type: ignore[arg-type]

    _on_ranks(2, tmp_path, _flip, job, str(tmp_path / "found"))

    found = json.loads((tmp_path / "found").read_text())
    assert not found["matches"] and found["deterministic"]
    assert "run 2 of 3 of the same step gave other bits on rank 1" in found["evidence"]


def _flip(rank: int, job: WorkerJob, found: str) -> None:
    """The second time the step is done, one bit of one moment of rank 1 is another."""
    step, runs = Engine.step, []

    def faulty(engine: Engine, *args: Any, **about: Any) -> torch.Tensor:
        loss = step(engine, *args, **about)
        runs.append(1)
        if len(runs) == 2 and rank == 1:
            moment = next(value for name, value in sorted(engine.state().items()) if "exp_avg" in name)
            moment.view(torch.int32)[7] ^= 1
        return loss

    Engine.step = faulty  # type: ignore[method-assign]
    said = replay_rank(job, "replayed/checkpoints/step-00000006", torch.device("cpu"))
    if rank == 0:
        Path(found).write_text(json.dumps(asdict(said)))


def test_what_cannot_be_replayed_is_said_in_one_line(run: Run) -> None:
    with pytest.raises(InputError, match="is the state after the last of 12 steps"):
        replay_step("replayed", run.folder.parent)
    with pytest.raises(InputError, match=r"has no such checkpoint.*there are: step-0000000"):
        replay_step("replayed", run.folder.parent, step=0)

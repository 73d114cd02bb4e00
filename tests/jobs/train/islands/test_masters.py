"""The adapter to DeepSpeed: master weights by name, at every stage that islands take."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tigerbot.models import build
from tigerbot.spec import TrainLoop
from tigerbot_jobs.train.data import BatchPlan
from tigerbot_jobs.train.engine import Engine, connect_ranks, trained_module
from tigerbot_jobs.train.islands import masters
from tigerbot_jobs.train.islands.layout import Layout, Piece, covers

VOCABULARY = 101  # odd, so that ranks cut parameters anywhere


def _rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"DS_ACCELERATOR": "cpu"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    connect_ranks(rank, world_size, torch.device("cpu"))
    for stage in (0, 1, 2):
        loop = TrainLoop(tokens=1, precision="fp32")
        module = trained_module(build("tiny", VOCABULARY, 1), loop, torch.device("cpu"))
        engine = Engine(module, loop, {"zero_stage": stage}, BatchPlan(2, 1, 1, 1), torch.device("cpu"))
        held = engine.slices()
        before = masters.read(engine, held)
        masters.write(engine, held, before + 1, step=3)
        named = {name: p.detach().numpy().reshape(-1) for name, p in engine._ds.module.named_parameters()}
        shown = np.concatenate([named[part.name][part.start : part.start + part.numel] for part in held])
        parts = np.array([(part.name, part.start, part.numel) for part in held], dtype=object)
        np.savez(f"{folder}/{stage}-{rank}.npz", parts=parts, before=before, shown=shown, **named)
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may abort a process that ends by itself


def test_master_weights_are_read_and_written_by_name_whoever_holds_them(tmp_path: Path) -> None:
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="spawn")  # type: ignore[attr-defined]

    start = dict(build("tiny", VOCABULARY, 1).named_parameters())
    sizes = {f"model.{name}": parameter.numel() for name, parameter in start.items()}
    layout = Layout(sizes)
    for stage in (0, 1, 2):
        ranks = [np.load(tmp_path / f"{stage}-{rank}.npz", allow_pickle=True) for rank in range(2)]
        pieces = [[Piece(*part) for part in rank["parts"]] for rank in ranks]
        assert covers(sizes, pieces[0] if stage == 0 else pieces[0] + pieces[1])
        whole = np.zeros(layout.size, np.float32)
        for rank, held in zip(ranks, pieces, strict=True):
            layout.scatter(whole, held, rank["before"])
            assert (rank["shown"] == rank["before"] + 1).all(), "the forward pass reads what was written"
        for name, parameter in start.items():
            wanted = parameter.detach().numpy().reshape(-1)
            assert (whole[layout.of(f"model.{name}")] == wanted).all()
            assert all((rank[f"model.{name}"] == wanted + 1).all() for rank in ranks)

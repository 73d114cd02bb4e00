"""AdamW with one byte a moment: near torch's AdamW, kept and put back by name, the same bits in every run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tigerbot.models import build
from tigerbot.spec import TrainLoop
from tigerbot.tokens import Batch
from tigerbot_jobs.train import adam8bit
from tigerbot_jobs.train.adam8bit import MOMENTS, AdamW8bit, as_float, moments_of, put_moments, state_bytes, with_bits
from tigerbot_jobs.train.data import BatchPlan

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradients(count: int, steps: int, *, decades: float = 2.0) -> list[Tensor]:
    """Of unequal size within a block."""
    generator = torch.Generator().manual_seed(count)
    sizes = 10 ** torch.empty(count).uniform_(-decades, 0, generator=generator)
    return [torch.randn(count, generator=generator) * sizes for _ in range(steps)]


def trained(optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> Tensor:
    param = optimizer.param_groups[0]["params"][0]
    for grad in grads:
        param.grad = grad.view_as(param).clone()
        optimizer.step()
    return param.detach()


def start(count: int) -> Tensor:
    return torch.linspace(-1, 1, count).clone()


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([1, 255, 256, 257, 1000, 70_001]), st.integers(1, 3))
def test_the_first_step_is_torchs_to_the_bit(count: int, pieces: int) -> None:
    grads = gradients(count, 1)
    theirs = trained(torch.optim.AdamW([start(count)], fused=True, **SETTINGS), grads)

    ours = trained(AdamW8bit([start(count)], **SETTINGS), grads)

    assert torch.equal(ours, theirs)


def test_many_steps_stay_near_torchs() -> None:
    grads = gradients(5000, 100)
    begin = start(5000)
    theirs = trained(torch.optim.AdamW([start(5000)], fused=True, **SETTINGS), grads)

    ours = trained(AdamW8bit([start(5000)], **SETTINGS), grads)

    assert 0 < (ours - theirs).norm() < 0.1 * (theirs - begin).norm()


def test_no_gradient_is_so_small_beside_its_neighbours_that_its_step_is_large() -> None:
    undecayed: dict[str, Any] = SETTINGS | {"weight_decay": 0.0}
    values = AdamW8bit([torch.zeros(5000)], **undecayed)
    last = torch.zeros(5000)

    for grad in gradients(5000, 30, decades=12.0):
        now = trained(values, [grad]).clone()

        assert (now - last).abs().max() <= 6 * undecayed["lr"]  # torch's AdamW: up to 1 / sqrt(1 - beta2) = 4.5
        last = now


def test_pieces_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = gradients(3000, 5)
    whole = trained(AdamW8bit([start(3000)], **SETTINGS), grads)

    monkeypatch.setattr(adam8bit, "_CPU_PIECE", 512)

    assert torch.equal(trained(AdamW8bit([start(3000)], **SETTINGS), grads), whole)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 1000), st.floats(1e-20, 1e10), st.integers(0, 2**30))
def test_a_moment_that_is_kept_is_near_what_it_was(count: int, size: float, seed: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * size
    optimizer = AdamW8bit([start(count)], **SETTINGS)
    (group,) = optimizer.param_groups
    flat = group["params"][0]

    put_moments(optimizer, flat, group, {"exp_avg": values, "exp_avg_sq": values.square()})

    state = moments_of(optimizer, flat, group)
    blocks = torch.arange(count) // 256
    largest = torch.stack([values[blocks == block].abs().amax() for block in range(int(blocks[-1]) + 1)])[blocks]
    assert ((as_float(state, "exp_avg", 0, count) - values).abs() <= 0.008 * largest).all()
    second = as_float(state, "exp_avg_sq", 0, count)
    assert ((second.sqrt() - values.abs()).abs() <= 0.004 * largest).all()
    assert (second[largest.square() > 1e-30] > 0).all()


def test_state_that_is_put_back_is_the_same_bits() -> None:
    grads = gradients(3000, 6)
    undisturbed = trained(AdamW8bit([start(3000)], **SETTINGS), grads)
    first = AdamW8bit([start(3000)], **SETTINGS)
    half = trained(first, grads[:3])
    kept = {
        name: tensor.clone()
        for name, tensor in moments_of(first, first.param_groups[0]["params"][0], first.param_groups[0]).items()
    }

    second = AdamW8bit([half.clone()], **SETTINGS)
    put_moments(second, second.param_groups[0]["params"][0], second.param_groups[0], kept)

    assert set(kept) == {"step"} | {f"{name}.{part}" for name in MOMENTS for part in ("codes", "scales")}
    assert torch.equal(trained(second, grads[3:]), undisturbed)


@pytest.mark.parametrize("cut", [1, 256, 700, 1999])
def test_state_cut_anew_stays_near(cut: int) -> None:
    grads = gradients(2000, 3)
    whole = AdamW8bit([start(2000)], **SETTINGS)
    trained(whole, grads)
    state = moments_of(whole, whole.param_groups[0]["params"][0], whole.param_groups[0])

    for begin, end in ((0, cut), (cut, 2000)):
        part = AdamW8bit([start(end - begin)], **SETTINGS)
        (group,) = part.param_groups
        floats = {name: as_float(state, name, begin, end) for name in MOMENTS}
        put_moments(part, group["params"][0], group, floats | {"step": state["step"]})

        found = moments_of(part, group["params"][0], group)
        assert found["step"] == 3
        for name in MOMENTS:
            wanted = floats[name]
            assert (as_float(found, name, 0, end - begin) - wanted).abs().max() <= 0.01 * wanted.abs().max()


def test_a_block_without_gradients_stays_where_it_is() -> None:
    undecayed: dict[str, Any] = SETTINGS | {"weight_decay": 0.0}
    optimizer = AdamW8bit([start(600)], **undecayed)

    assert torch.equal(trained(optimizer, [torch.zeros(600)] * 3), start(600))


def test_a_gradient_that_is_not_a_number_is_not_hidden() -> None:
    grad = torch.ones(600)
    grad[300] = float("nan")

    values = trained(AdamW8bit([start(600)], **SETTINGS), [grad, torch.ones(600)])

    assert values[256:512].isnan().any() and not values[:256].isnan().any()


def test_embeddings_and_vectors_keep_float32_and_the_rest_two_bytes() -> None:
    model: Any = build("tiny", 600, 1)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]

    groups = with_bits([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], model)

    table = model.get_input_embeddings().weight
    assert [(group["bits"], group["weight_decay"]) for group in groups] == [(8, 0.1), (32, 0.1), (32, 0.0)]
    assert groups[1]["params"] == [table] and len(groups[0]["params"]) == len(matrices) - 1
    optimizer = AdamW8bit(groups, **SETTINGS)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    small = sum(p.numel() for p in groups[0]["params"])
    exact = table.numel() + sum(p.numel() for p in vectors)
    assert state_bytes(optimizer) <= 8 * exact + (2 + 8 / 256) * small + 8 * len(optimizer.state) * 2


def _rank(rank: int, folder: str) -> None:
    from tigerbot_jobs.train.engine import Engine, connect_ranks, trained_module

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    connect_ranks(rank, 2, torch.device("cpu"))
    found = {}
    for stage in range(4):
        for optimizer in ("adamw", "adamw8bit", "adamw8bit")[: 3 if stage == 2 else 2]:
            loop = TrainLoop(tokens=1, lr=3e-3, precision="fp32", optimizer=optimizer)
            plan = BatchPlan(4, 2, 1, 8)
            module = trained_module(build("tiny", 600, 1), loop, torch.device("cpu"))
            engine = Engine(module, loop, {"zero_stage": stage}, plan, torch.device("cpu"))
            losses = [float(engine.step([batch_of(rank)], lr=3e-3, counted_tokens=4 * 23)) for _ in range(5)]
            adam = engine._ds.optimizer if stage == 0 else engine._ds.optimizer.optimizer
            found.setdefault((stage, optimizer), []).append((losses, state_bytes(adam)))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may abort a process that ends by itself


def batch_of(rank: int) -> Batch:
    ids = torch.randint(0, 600, (2, 24), generator=torch.Generator().manual_seed(rank)).numpy()
    return Batch(ids, ids, np.tile(np.arange(24), (2, 1)), np.ones_like(ids))


def test_two_ranks_learn_with_it_at_every_zero_stage(tmp_path: Path) -> None:
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="spawn")  # type: ignore[attr-defined]

    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for stage in range(4):
            ((exact, exact_bytes),) = found[stage, "adamw"]
            (ours, ours_bytes), *again = found[stage, "adamw8bit"]
            assert all(other == (ours, ours_bytes) for other in again)  # to the bit
            assert ours == pytest.approx(exact, rel=0.02) and ours[-1] < 0.9 * ours[0]
            # A tenth of `tiny` is its embedding of 600 tokens.
            assert ours_bytes < 0.4 * exact_bytes

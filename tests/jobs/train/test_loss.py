"""The loss that never holds the logits: torch's value and gradients, at every ZeRO stage, with adapters or without."""

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
from torch import Tensor, nn

from tigerbot.models import add_lora, build
from tigerbot.spec import Lora, TrainLoop
from tigerbot.tokens import Batch
from tigerbot_jobs.train import loss as loss_file
from tigerbot_jobs.train import model as model_file
from tigerbot_jobs.train.data import BatchPlan
from tigerbot_jobs.train.loss import OutputLoss, chunk_tokens, output_loss
from tigerbot_jobs.train.model import LanguageModel


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a kilobyte: a few tokens."""
    monkeypatch.setattr(loss_file, "_CPU_CHUNK_BYTES", 1024)


def drawn(tokens: int, hidden: int, vocabulary: int, *, bias: bool = False) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(tokens * 7919 + hidden * 31 + vocabulary)
    output = nn.Linear(hidden, vocabulary, bias=bias)
    return torch.randn(tokens, hidden, requires_grad=True), output, torch.randint(0, vocabulary, (tokens,))


def plain(hidden: Tensor, output: nn.Linear, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output(hidden).float(), targets, reduction="sum")


def same(found: Tensor | None, wanted: Tensor | None, tolerance: float = 1e-6) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return float((found - wanted).norm()) <= tolerance * float(wanted.norm()) + 1e-12


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 70), st.integers(1, 33), st.integers(2, 300), st.booleans(), st.booleans(), st.booleans())
def test_value_and_gradients_are_those_of_full_logits(tokens, hidden_size, vocabulary, bias, frozen, scaled) -> None:
    hidden, output, targets = drawn(tokens, hidden_size, vocabulary, bias=bias)
    output.requires_grad_(not frozen)
    inputs = [hidden, *(p for p in output.parameters() if p.requires_grad)]
    scale = 0.37 if scaled else 1.0

    wanted = plain(hidden, output, targets)
    found = OutputLoss(output)(hidden, targets)

    assert same(found, wanted) and found.dtype == torch.float32
    wanted_grads = torch.autograd.grad(wanted * scale, inputs)
    assert all(map(same, torch.autograd.grad(found * scale, inputs), wanted_grads))


def test_the_small_chunks_of_these_tests_are_many() -> None:
    assert chunk_tokens(100, torch.device("cpu")) == 2


def test_tied_weights_get_the_gradients_of_both_uses() -> None:
    _, output, targets = drawn(40, 16, 50)
    table = nn.Embedding(50, 16)
    table.weight = output.weight

    wanted = torch.autograd.grad(plain(table(targets.flip(0)), output, targets), [table.weight])
    found = torch.autograd.grad(OutputLoss(output)(table(targets.flip(0)), targets), [table.weight])

    assert same(found[0], wanted[0])


def test_under_autocast_products_are_bf16_and_sums_float32() -> None:
    hidden, output, targets = drawn(64, 32, 200)
    inputs = [hidden, output.weight]

    with torch.autocast("cpu", torch.bfloat16):
        wanted = plain(hidden, output, targets)
        found = OutputLoss(output)(hidden, targets)

    assert same(found, wanted, 1e-6)  # the same bf16 logits
    exact = torch.autograd.grad(plain(hidden, output, targets), inputs)
    for ours, theirs, truth in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), exact, strict=True
    ):
        assert ours.dtype == torch.float32 and same(ours, theirs, 1e-2)
        assert (ours - truth).norm() <= 1.1 * (theirs - truth).norm()


def test_a_frozen_output_matrix_costs_no_gradient() -> None:
    hidden, output, targets = drawn(30, 8, 40)
    output.requires_grad_(False)

    loss = OutputLoss(output)(hidden, targets)
    found: Any = loss.grad_fn

    assert [grad is None for grad in found.found] == [False, True, True]


def test_without_gradients_none_is_made() -> None:
    hidden, output, targets = drawn(30, 8, 40)

    with torch.no_grad():
        loss = OutputLoss(output)(hidden, targets)

    assert not loss.requires_grad and same(loss, plain(hidden, output, targets))


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    hidden, output, targets = drawn(30, 8, 40)
    loss = OutputLoss(output)(hidden, targets)
    loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def batch_of(sequences: int, vocabulary: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(0, vocabulary, (sequences, 24), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :5] = -100
    return ids, labels, torch.arange(24).expand(sequences, 24)


@pytest.mark.parametrize("adapted", ["q_proj", "lm_head"])
def test_adapters_on_the_output_matrix_are_not_passed_by(monkeypatch: pytest.MonkeyPatch, adapted: str) -> None:
    monkeypatch.setattr("tigerbot.models.LORA_TARGETS", [adapted])
    torch.manual_seed(1)
    model: Any = add_lora(build("tiny", 300, 1), Lora(rank=4))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    module = LanguageModel(model, None)

    found = module(*batch_of(2, 300))

    ids, labels, _ = batch_of(2, 300)
    logits = model(input_ids=ids).logits[:, :-1]
    assert same(found, nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="sum"), 1e-5)
    assert (module._output_loss is None) == (adapted == "lm_head")


def test_only_a_plain_matrix_is_taken() -> None:
    class Rounded(nn.Linear):
        pass

    assert output_loss(Rounded(2, 3)) is None and output_loss(nn.Linear(2, 3)) is not None


def test_sharing_the_output_matrix_adds_no_parameter() -> None:
    model: Any = build("tiny", 300, 1)

    names = [name for name, _ in LanguageModel(model, None).named_parameters()]

    assert names == [f"model.{name}" for name, _ in model.named_parameters()]


def _rank(rank: int, folder: str) -> None:
    from tigerbot_jobs.train.engine import Engine, connect_ranks, trained_module

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    connect_ranks(rank, 2, torch.device("cpu"))
    loss_file._CPU_CHUNK_BYTES = 4 * 600 * 8
    loop = TrainLoop(tokens=1, lr=3e-3, precision="fp32")
    found = {}
    for way in ("chunked", "plain"):
        if way == "plain":
            model_file.output_loss = lambda output: None
        for stage in range(4):
            engine = Engine(
                trained_module(build("tiny", 600, 1), loop, torch.device("cpu")),
                loop,
                {"zero_stage": stage},
                BatchPlan(8, 2, 2, 4),
                torch.device("cpu"),
            )
            losses = []
            for _ in range(3):
                # Ranks carry unequally many labels: they must still meet in the same collectives.
                micro = [ids_of(rank, part) for part in range(2)]
                losses.append(float(engine.step(micro, lr=3e-3, counted_tokens=8 * 19)))
            losses.append(float(engine.loss([ids_of(rank, 2)])[0]))
            found[way, stage] = losses
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may abort a process that ends by itself


def ids_of(rank: int, part: int) -> Batch:
    ids, labels, positions = batch_of(2, 600, seed=part * 2 + rank)
    if rank:
        labels[:, 12:] = -100
    return Batch(ids.numpy(), labels.numpy(), positions.numpy(), np.ones_like(ids.numpy()))


def test_two_ranks_learn_the_same_at_every_zero_stage_as_with_full_logits(tmp_path: Path) -> None:
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="spawn")  # type: ignore[attr-defined]

    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for stage in range(4):
            assert found["chunked", stage] == pytest.approx(found["plain", stage], rel=2e-5)
            assert found["chunked", stage] == pytest.approx(found["chunked", 0], rel=1e-4)
        assert found["chunked", 0][2] < 0.95 * found["chunked", 0][0]

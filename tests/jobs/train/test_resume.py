"""Exact resume: the state of a run that was cut is, bit for bit, the state of one that was not."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_corpus import Corpus, as_train, fingerprint

from tigerbot.errors import CorruptError, IdentityError
from tigerbot.models import load_model
from tigerbot.spec import parse_spec, spec_hash
from tigerbot.storage import open_store
from tigerbot_jobs.train.alone import train_rank
from tigerbot_jobs.train.checkpoint import read_header
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.identity import fields_of
from tigerbot_jobs.train.metrics import read_rows


def job_of(raw: dict[str, Any], corpus: Corpus, *, hash: str = "") -> WorkerJob:
    spec = as_train(raw)
    folder = Path(spec.storage.uri) / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    shards = [(corpus.folder / "tokens/train", 1.0)]
    return WorkerJob(spec, hash or spec_hash(spec), str(folder), shards, [corpus.folder / "tokens/held-out"], 1)


def _rank(rank: int, world_size: int, meeting: str, jobs: list[WorkerJob]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    for job in jobs:
        train_rank(job, rank, world_size, torch.device("cpu"))
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may abort a process that ends by itself


def train(jobs: list[WorkerJob], world_size: int, tmp_path: Path) -> None:
    mp.start_processes(  # type: ignore[attr-defined]
        _rank, (world_size, str(tmp_path / "meeting"), jobs), nprocs=world_size, start_method="spawn"
    )
    (tmp_path / "meeting").unlink(missing_ok=True)


def cut_short(raw: dict[str, Any], step: int) -> None:
    """As a kill after the checkpoint at `step` leaves a run: nothing later exists."""
    for folder in (Path(raw["storage"]["uri"]) / raw["name"] / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            (folder / "MANIFEST.json").unlink()


@pytest.fixture(scope="module")
def stages(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Twelve steps on two ranks at every ZeRO stage, bf16 products and two parameter groups."""
    storage = tmp_path_factory.mktemp("stages")
    raws = {}
    for stage in range(4):
        raws[stage] = corpus.spec(f"zero-{stage}", storage) | {
            "deepspeed": {"zero_stage": stage},
            "storage": {"uri": str(storage), "keep": 10},
        }
    train([job_of(raw, corpus) for raw in raws.values()], 2, storage)
    return raws


def test_a_resumed_run_reaches_the_same_bits_at_every_zero_stage(
    stages: dict[int, dict[str, Any]], corpus: Corpus, tmp_path: Path
) -> None:
    undisturbed = {stage: fingerprint(raw) for stage, raw in stages.items()}
    for raw in stages.values():
        cut_short(raw, 6)

    train([job_of(raw, corpus) for raw in stages.values()], 2, tmp_path)

    assert {stage: fingerprint(raw) for stage, raw in stages.items()} == undisturbed


def test_every_stage_learns_the_same_thing(stages: dict[int, dict[str, Any]]) -> None:
    losses = []
    for raw in stages.values():
        rows = read_rows(Path(raw["storage"]["uri"]) / raw["name"] / "metrics.jsonl")
        losses.append([row["loss"] for row in rows])

    for stage in losses[1:]:
        assert stage == pytest.approx(losses[0], rel=2e-3)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_the_saved_model_is_the_one_that_was_trained(stages: dict[int, dict[str, Any]]) -> None:
    weights = [
        load_model(Path(raw["storage"]["uri"]) / raw["name"] / "model").get_input_embeddings().weight
        for raw in stages.values()
    ]

    for weight in weights[1:]:
        assert torch.allclose(weight, weights[0], atol=2e-2)
    assert not torch.equal(weights[0], torch.zeros_like(weights[0]))


def test_a_checkpoint_says_which_model_it_is_of_as_the_driver_knows_it(stages: dict[int, dict[str, Any]]) -> None:
    for raw in stages.values():
        store = open_store(raw["storage"]["uri"])
        header = read_header(store, store.committed(f"{raw['name']}/checkpoints")[-1])

        assert header.model == fields_of(as_train(raw)) and header.model["num_attention_heads"] == 4


def test_the_same_batch_on_one_rank_and_on_two_gives_the_same_loss(
    stages: dict[int, dict[str, Any]], corpus: Corpus, tmp_path: Path
) -> None:
    raw = corpus.spec("alone", tmp_path) | {"deepspeed": {"zero_stage": 2}}

    train([job_of(raw, corpus)], 1, tmp_path)

    two = Path(stages[2]["storage"]["uri"]) / "zero-2/metrics.jsonl"
    for one_rank, two_ranks in zip(read_rows(tmp_path / "alone/metrics.jsonl"), read_rows(two), strict=True):
        assert one_rank["loss"] == pytest.approx(two_ranks["loss"], rel=2e-3)
        assert one_rank["lr"] == two_ranks["lr"] and one_rank["tokens"] == two_ranks["tokens"]


def test_a_lora_run_resumes_and_its_adapter_names_its_base(
    stages: dict[int, dict[str, Any]], corpus: Corpus, tmp_path: Path
) -> None:
    base = Path(stages[0]["storage"]["uri"]) / "zero-0/model"
    raw = corpus.spec("lora", tmp_path) | {"model": {"path": str(base)}, "lora": {"rank": 4, "alpha": 8}}
    train([job_of(raw, corpus)], 1, tmp_path)
    undisturbed = fingerprint(raw)
    cut_short(raw, 8)

    train([job_of(raw, corpus)], 1, tmp_path)

    assert fingerprint(raw) == undisturbed
    about = json.loads((tmp_path / "lora/model/tiger.json").read_text())
    assert (tmp_path / "lora/model" / about["base"]).resolve() == base.resolve()
    assert load_model(tmp_path / "lora/model").peft_config


@pytest.mark.soak
def test_a_run_goes_on_with_another_number_of_ranks_and_another_stage(
    stages: dict[int, dict[str, Any]], corpus: Corpus, tmp_path: Path
) -> None:
    raw, storage = stages[3], Path(stages[3]["storage"]["uri"])
    undisturbed = read_rows(storage / "zero-3/metrics.jsonl")
    cut_short(raw, 6)
    other = raw | {"deepspeed": {"zero_stage": 2}}

    train([job_of(other, corpus, hash=spec_hash(parse_spec(raw)))], 1, tmp_path)

    for before, after in zip(undisturbed, read_rows(storage / "zero-3/metrics.jsonl"), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], rel=2e-3)
        assert after["lr"] == before["lr"] and after["tokens"] == before["tokens"]


def test_a_checkpoint_of_another_spec_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    raw = corpus.spec("other", tmp_path, tokens=1024)
    train([job_of(raw, corpus)], 1, tmp_path)
    other = parse_spec(raw | {"train": raw["train"] | {"lr": 1e-4}})

    with pytest.raises(Exception, match="spec_hash was") as refused:
        train([job_of(raw, corpus, hash=spec_hash(other))], 1, tmp_path)

    assert IdentityError.__name__ in str(refused.value)


def flip(state: Path, place: int) -> None:
    data = bytearray(state.read_bytes())
    data[place] ^= 1
    state.write_bytes(data)


@pytest.mark.soak
def test_a_flipped_byte_costs_one_checkpoint_and_a_second_one_the_run(
    corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = corpus.spec("damaged", tmp_path, tokens=1024)
    train([job_of(raw, corpus)], 2, tmp_path)
    undisturbed = fingerprint(raw, 4)
    folder = tmp_path / "damaged/checkpoints"
    flip(folder / "step-00000004/rank-00001.safetensors", -1000)

    train([job_of(raw, corpus)], 2, tmp_path)

    assert fingerprint(raw, 4) == undisturbed
    said = capfd.readouterr().out
    assert said.count("step-00000004 is damaged") == 1 and "rank-00001.safetensors: differs from its manifest" in said
    assert (folder / "step-00000004/DAMAGED.json").exists()

    flip(folder / "step-00000002/rank-00000.safetensors", 20)  # in its header
    flip(folder / "step-00000004/rank-00000.safetensors", -1000)
    with pytest.raises(Exception, match="no whole checkpoint is left") as corrupt:
        train([job_of(raw, corpus)], 2, tmp_path)

    assert CorruptError.__name__ in str(corrupt.value)

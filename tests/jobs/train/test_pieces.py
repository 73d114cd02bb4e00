"""The parts of training that need no process group."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import Corpus, as_train

from tigerbot.errors import DataError, SpecError
from tigerbot.models import build
from tigerbot.spec import TrainLoop
from tigerbot.tokens import TokenShards
from tigerbot_jobs.train.data import BatchPlan, TrainingData, plan_batches
from tigerbot_jobs.train.deepspeed_config import deepspeed_config
from tigerbot_jobs.train.metrics import append_row, read_rows
from tigerbot_jobs.train.model import LanguageModel
from tigerbot_jobs.train.preview import preview
from tigerbot_jobs.train.schedule import learning_rate


def test_wsd_warms_up_stays_and_decays_to_nothing() -> None:
    loop = TrainLoop(tokens=1, lr=1.0, schedule="wsd", warmup_fraction=0.1, decay_fraction=0.2)

    rates = [learning_rate(step, 100, loop) for step in range(100)]

    assert rates[0] == 0.1 and rates[9] == 1.0
    assert set(rates[10:80]) == {1.0}
    assert rates[80:] == sorted(rates[80:], reverse=True) and 0 < rates[-1] < 0.05


@settings(deadline=None)
@given(st.sampled_from(["wsd", "cosine", "constant"]), st.integers(1, 500), st.floats(0, 0.5), st.floats(0, 0.5))
def test_no_learning_rate_is_negative_or_above_the_peak(schedule, steps, warmup, decay) -> None:
    loop = TrainLoop(tokens=1, lr=0.5, schedule=schedule, warmup_fraction=warmup, decay_fraction=decay)

    assert all(0 < learning_rate(step, steps, loop) <= 0.5 + 1e-12 for step in range(steps))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_world_size_reads_the_same_sequences_in_the_same_global_batch(
    corpus: Corpus, tmp_path: Path, world_size: int
) -> None:
    spec = as_train(corpus.spec("x", tmp_path))
    data = data_of(corpus, TokenShards(corpus.folder / "tokens/train").tokenizer_hash)

    def global_batch(world_size: int, step: int) -> np.ndarray:
        plan = plan_batches(spec, world_size)
        ranks = [data.micro_batches(step, plan, rank, world_size) for rank in range(world_size)]
        assert {len(micro) for micro in ranks} == {plan.micro_steps}
        with_labels = [batch for micro in ranks for batch in micro if (batch.labels != -100).any()]
        return np.concatenate([batch.input_ids for batch in with_labels])

    for step in (0, 1, 50):
        assert (global_batch(world_size, step) == global_batch(1, step)).all()


@given(sequences=st.integers(1, 64), micro=st.integers(1, 9), world_size=st.integers(1, 9))
def test_a_global_batch_is_shared_out_once_whatever_the_ranks(sequences: int, micro: int, world_size: int) -> None:
    micro_steps = math.ceil(math.ceil(sequences / micro) / world_size)
    plan = BatchPlan(sequences, micro, micro_steps, 1)

    spans = [span for rank in range(world_size) for span in plan.spans(rank, world_size)]

    assert len(spans) == micro_steps * world_size
    shared_out = [first + offset for first, count in spans for offset in range(count)]
    assert shared_out == list(range(sequences))


def test_a_packed_sequence_has_the_loss_of_its_documents_read_alone() -> None:
    model = LanguageModel(build("tiny", 100, 1), None).eval()
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, 100, (length,), generator=generator) for length in (5, 9, 2)]

    def loss(ids: torch.Tensor, positions: torch.Tensor) -> float:
        labels = ids.clone()
        labels[positions == 0] = -100
        return float(model(ids[None], labels[None], positions[None]))

    alone = sum(loss(ids, torch.arange(len(ids))) for ids in documents)
    packed = loss(torch.cat(documents), torch.cat([torch.arange(len(ids)) for ids in documents]))

    assert packed == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "workers", "message"),
    [
        ({"batch_tokens": 250}, 1, "wants a multiple of data.sequence_length 32"),
        ({"batch_tokens": 16}, 1, "set it to 32"),
        ({"batch_tokens": 96}, 4, "cannot be shared by 4 workers"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_refused(corpus: Corpus, tmp_path: Path, change, workers, message) -> None:
    with pytest.raises(SpecError, match=message):
        plan_batches(as_train(corpus.spec("x", tmp_path, **change)), workers)


@pytest.mark.parametrize(
    ("given_config", "message"),
    [({"zero_stage": 5}, "wants 0, 1, 2 or 3"), ({"gradient_clipping": 2}, "set by the train section")],
)
def test_a_deepspeed_section_that_fights_the_loop_is_refused(
    corpus: Corpus, tmp_path: Path, given_config, message
) -> None:
    spec = as_train(corpus.spec("x", tmp_path))

    with pytest.raises(SpecError, match=message):
        deepspeed_config(spec.train, given_config, plan_batches(spec, 1), parameters=10, bf16=False)


def test_deepspeeds_own_keys_pass_through(corpus: Corpus, tmp_path: Path) -> None:
    spec = as_train(corpus.spec("x", tmp_path))
    given_config = {"zero_optimization": {"stage": 3, "overlap_comm": True}, "communication_data_type": "fp32"}

    config = deepspeed_config(spec.train, given_config, plan_batches(spec, 1), parameters=10, bf16=False)

    assert config["zero_optimization"]["stage"] == 3 and config["zero_optimization"]["overlap_comm"]
    assert config["communication_data_type"] == "fp32"


def test_shards_of_another_tokenizer_are_refused(corpus: Corpus) -> None:
    with pytest.raises(DataError, match="was packed with tokenizer"):
        data_of(corpus, "another")


def data_of(corpus: Corpus, tokenizer_hash: str) -> TrainingData:
    shards = [(corpus.folder / "tokens/train", 1.0)]
    return TrainingData(shards, [], sequence_length=32, tokenizer_hash=tokenizer_hash, seed=1, verify=True)


def test_metrics_of_a_resumed_run_count_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step, loss in ((1, 9.0), (2, 8.0), (3, float("nan")), (2, 7.5), (3, 7.0)):
        append_row(path, {"step": step, "loss": loss})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')

    assert [row["loss"] for row in read_rows(path)] == [9.0, 7.5, 7.0]
    assert json.loads(path.read_text().splitlines()[2])["loss"] is None


def test_a_dry_run_shows_the_plan_and_what_carries_loss(corpus: Corpus, tmp_path: Path) -> None:
    lines = preview(as_train(corpus.spec("dry", tmp_path)))

    assert lines[0].startswith("12 steps of 8 sequences x 32 tokens")
    assert "M parameters" in lines[1] and "ZeRO 2" in lines[1]
    assert lines[2].startswith("sequence 0: ⟦") and "⟧" in lines[2]
    assert not (tmp_path / "dry").exists()

"""Mistakes in a training job: one line each, exit status 2, and nothing was started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_corpus import Corpus, as_file, as_train

from tigerbot.cli import main
from tigerbot.errors import IdentityError, InputError
from tigerbot_jobs.train import checks
from tigerbot_jobs.train.checkpoint import Header


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["scale.workers=[4,2]"], "scale: workers wants 1 <= min <= max; got [4, 2]"),
        (["storage.uri=/proc/nowhere"], "/proc/nowhere/bad: cannot be written"),
        (["deepspeed.zero_stag=2"], "deepspeed.zero_stag: DeepSpeed has no such key; did you mean zero_stage?"),
        (["deepspeed.zero_optimization={stag: 3}"], "zero_optimization.stag: DeepSpeed has no such key; did you mean stage?"),
        (["deepspeed.zero_optimization=3"], "deepspeed.zero_optimization: got 3, wants a mapping"),
        (
            ["deepspeed.zero_optimization={stage: 3, offload_param: {device: nvme}}"],
            "offload_param.device: state on nvme is in no memory that a snapshot could be taken of; offload to cpu",
        ),
        (
            ["deepspeed={zero_stage: 1, bf16: {enabled: true}, data_types: {grad_accum_dtype: fp32}}"],
            "deepspeed.data_types.grad_accum_dtype: ZeRO 1 with bf16 weights and fp32 gradients keeps its state in a way",
        ),
        (["data.train.0.path=/nowhere"], "/nowhere: is not a folder of token shards"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_status_2(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    said: str,
) -> None:
    path = as_file(corpus.spec("bad", tmp_path), tmp_path)
    monkeypatch.setattr(sys, "argv", ["tiger", "run", str(path), *(f"--set={change}" for change in changes)])

    with pytest.raises(SystemExit) as ended:
        main()

    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert len(lines) == 1 and said in lines[0]


def test_a_fleet_of_workers_is_refused_on_one_machine_and_a_few_to_a_core_are_not(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    spec = as_train(corpus.spec("fleet", tmp_path) | {"scale": {"workers": 32, "standbys": 0}})
    few = as_train(corpus.spec("few", tmp_path) | {"scale": {"workers": 4, "standbys": 1}})

    with pytest.raises(InputError, match="32 workers and standbys want 32 CPUs, this machine has 2"):
        checks.local_cpus(spec)
    assert checks.local_cpus(few) == 5


def test_more_workers_than_the_cluster_can_hold_are_refused_with_what_it_has(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0})
    spec = as_train(corpus.spec("big", tmp_path) | {"scale": {"workers": [8, 16]}})

    with pytest.raises(InputError) as refused:
        checks.slots_of(spec)

    assert "wants at least 8 workers, the cluster can hold 4 (4 CPUs, 0 GPUs)" in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_checkpoint_of_something_else_names_every_field_that_differs() -> None:
    kept = Header(3, 1, 2, "spec-1", "tokenizer-1", 1, data_hash="data-1")

    with pytest.raises(IdentityError) as refused:
        kept.check("checkpoint x", spec_hash="spec-1", tokenizer_hash="tokenizer-2", data_hash="data-2")

    line = str(refused.value)
    assert "tokenizer_hash was tokenizer-1, now it is tokenizer-2; data_hash was data-1, now it is data-2" in line
    assert "spec_hash" not in line and refused.value.exit_code == 2


def test_a_checkpoint_from_before_data_was_named_goes_on() -> None:
    Header(3, 1, 2, "spec", "tokenizer", 1).check("x", spec_hash="spec", tokenizer_hash="tokenizer", data_hash="data")

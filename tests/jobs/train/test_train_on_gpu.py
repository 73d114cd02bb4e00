"""The same loop on a GPU: NCCL, bf16 weights with float32 masters. `pytest -m gpu` where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small_corpus import Corpus, as_train

from tigerbot.spec import spec_hash
from tigerbot_jobs.train.alone import train_rank
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.metrics import read_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here"),
]


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    meeting = tmp_path_factory.mktemp("gpu") / "meeting"
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{meeting}", rank=0, world_size=1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_learns_and_resumes_at_every_zero_stage(corpus: Corpus, tmp_path: Path, stage: int) -> None:
    raw = corpus.spec("gpu", tmp_path) | {"deepspeed": {"zero_stage": stage}}
    spec = as_train(raw)
    folder = tmp_path / "gpu"
    folder.mkdir()
    shards = [(corpus.folder / "tokens/train", 1.0)]
    job = WorkerJob(spec, spec_hash(spec), str(folder), shards, [corpus.folder / "tokens/held-out"], 1)

    train_rank(job, 0, 1, torch.device("cuda", 0))
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > 10:
            (checkpoint / "MANIFEST.json").unlink()
    before = read_rows(folder / "metrics.jsonl")[-1]
    train_rank(job, 0, 1, torch.device("cuda", 0))

    rows = read_rows(folder / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["loss"] == pytest.approx(before["loss"], rel=1e-3)

"""Weights out of a stock DeepSpeed checkpoint, at every ZeRO stage; a pickle that is more than weights is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_corpus import Corpus, as_train

from tigerbot.deepspeed_weights import load_deepspeed_weights
from tigerbot.errors import ModelError
from tigerbot.models import build
from tigerbot_jobs.train.model import make_model

VOCABULARY = 600


def _rank(rank: int, meeting: str, folder: str) -> None:
    import deepspeed

    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    for stage in range(4):
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
            "zero_optimization": {"stage": stage},
        }
        model: Any = build("tiny", VOCABULARY, 1)
        engine = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config
        )[0]
        ids = torch.arange(16)[None] + 100
        engine.backward(engine(input_ids=ids, labels=ids, use_cache=False).loss)
        engine.step()
        engine.save_checkpoint(f"{folder}/{stage}")
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may abort a process that ends by itself


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    mp.start_processes(_rank, (str(folder / "meeting"), str(folder)), nprocs=2, start_method="spawn")  # type: ignore[attr-defined]
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model = build("tiny", VOCABULARY, 2)
    load_deepspeed_weights(model, folder)
    return model.state_dict()


def test_every_stage_gives_the_same_weights(checkpoints: Path) -> None:
    fresh = build("tiny", VOCABULARY, 1).state_dict()
    found = {stage: weights(checkpoints / str(stage)) for stage in range(4)}

    for name, tensor in found[0].items():
        assert not torch.equal(tensor, fresh[name]) and tensor.dtype == torch.float32
        for stage in (1, 2, 3):
            torch.testing.assert_close(found[stage][name], tensor, atol=1e-5, rtol=1e-4)


def test_training_begins_from_them(checkpoints: Path, corpus: Corpus, tmp_path: Path) -> None:
    raw = corpus.spec("from-deepspeed", tmp_path)
    raw["model"]["weights"] = str(checkpoints / "2")

    model = make_model(as_train(raw))

    torch.testing.assert_close(model.state_dict()["lm_head.weight"], weights(checkpoints / "2")["lm_head.weight"])


class Bomb:
    def __init__(self, leaves: Path) -> None:
        self._leaves = leaves

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._leaves}",)


def test_a_pickle_that_is_more_than_weights_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"module": {}, "x": Bomb(tmp_path / "exploded")}, tmp_path / "mp_rank_00_model_states.pt")

    with pytest.raises(ModelError, match="holds more than weights and is not loaded"):
        weights(tmp_path)

    assert not (tmp_path / "exploded").exists()


def test_what_is_no_checkpoint_or_does_not_fit_is_one_line(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a DeepSpeed checkpoint"):
        weights(tmp_path)
    with pytest.raises(ModelError, match="does not fit the model"):
        load_deepspeed_weights(build("tiny", VOCABULARY + 8, 1), checkpoints / "2")
    lost = next((checkpoints / "1").glob("global_step*/*rank_1*_optim_states.pt"))
    lost.rename(tmp_path / lost.name)
    with pytest.raises(ModelError, match="has the shards of 1 ranks, wants 2"):
        weights(checkpoints / "1")
    (tmp_path / lost.name).rename(lost)

"""A checkpoint without an engine: what is kept comes back; damage is found, said, and kept for whoever looks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tigerbot.errors import StorageError
from tigerbot.storage import open_store
from tigerbot_jobs.train.checkpoint import Checkpoints, Header, commit, file_of, persist_file
from tigerbot_jobs.train.shard import ShardMeta, Slice, write_shard

STATE = {"0.master": torch.arange(2000.0), "0.step": torch.ones(1)}


def header(step: int, world_size: int = 1) -> Header:
    return Header(step, world_size, 2, "spec", "tokenizer", 1)


def meta(step: int) -> ShardMeta:
    return ShardMeta(step, 0, 1, 2, 0, (Slice("w", (2000,), 0, 2000, 0, 0),))


@pytest.fixture
def checkpoints(tmp_path: Path) -> Iterator[Checkpoints]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    made = Checkpoints(open_store(str(tmp_path)), "run/checkpoints", keep=2)
    for step in (1, 2):
        made.save({name: tensor + step for name, tensor in STATE.items()}, meta(step), header(step))
    yield made
    dist.destroy_process_group()


def restored(checkpoints: Checkpoints) -> tuple[int, Tensor] | None:
    found = []
    while (key := checkpoints.latest()) is not None:

        def put(metas, read) -> None:
            found.append((metas[0].step, read(0, "0.master", 0, 2000).clone()))

        if checkpoints.restore(key, put, wanted=lambda metas: {0}):
            return found[-1]
    return None


@pytest.mark.parametrize("place", [20, -1000], ids=["header", "tensor"])
def test_after_a_flipped_byte_the_one_before_is_used_and_the_damaged_one_stays(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: int
) -> None:
    newest = tmp_path / "run/checkpoints/step-00000002"
    data = bytearray((newest / file_of(0)).read_bytes())
    data[place] ^= 1
    (newest / file_of(0)).write_bytes(data)

    found = restored(checkpoints)

    assert found is not None and found[0] == 1 and torch.equal(found[1], STATE["0.master"] + 1)
    assert "checkpoint run/checkpoints/step-00000002 is damaged" in capsys.readouterr().out
    for step in (3, 4, 5):
        checkpoints.save(STATE, meta(step), header(step))
    kept = sorted(folder.name for folder in newest.parent.iterdir())
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]
    assert (newest / "DAMAGED.json").exists() and not (newest / "MANIFEST.json").exists()


def test_a_flipped_byte_in_the_header_of_a_checkpoint_sets_it_aside(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest, before = (f"run/checkpoints/step-0000000{step}" for step in (2, 1))
    path = tmp_path / newest / "header.json"
    path.write_bytes(path.read_bytes().replace(b"spec", b"spek", 1))

    found = checkpoints.header(newest)

    assert found is None and checkpoints.latest() == before and checkpoints.header(before) == header(1)
    assert f"checkpoint {newest} is damaged ({newest}/header.json" in capsys.readouterr().out.replace(
        f"{tmp_path}/", ""
    )


def test_what_the_keeper_persists_out_of_memory_is_a_checkpoint(checkpoints: Checkpoints, tmp_path: Path) -> None:
    store, key = open_store(str(tmp_path)), "run/checkpoints/step-00000009"
    write_shard(tmp_path / "image", meta(9), STATE)

    file = persist_file(store, key, memoryview((tmp_path / "image").read_bytes()), file_of(0))
    with pytest.raises(StorageError, match=r"rank-00001.safetensors has not arrived"):
        commit(store, key, header(9, world_size=2), [file])
    commit(store, key, header(9), [file])

    found = restored(checkpoints)
    assert found is not None and found[0] == 9 and torch.equal(found[1], STATE["0.master"])
    assert os.listdir(tmp_path / key) and checkpoints.header(key) == header(9)

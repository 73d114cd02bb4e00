"""Heavy members of a population: what is staged, what a run goes on from, and what a death in between leaves."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tigerbot.errors import StorageError
from tigerbot.runs import Run, open_run
from tigerbot.spec import TrainSpec, parse_spec, spec_hash
from tigerbot.storage import ManifestFile, open_store
from tigerbot_jobs.sweep import checkpoints
from tigerbot_jobs.sweep.checkpoints import Checkpoints, taken_step
from tigerbot_jobs.train.checkpoint import Header, commit


def spec_of(folder: Path, name: str, lr: float = 1e-3) -> TrainSpec:
    raw: dict[str, Any] = {
        "kind": "train",
        "name": name,
        "model": {"preset": "tiny"},
        "data": {"train": [{"path": "x"}]},
    }
    spec = parse_spec(raw | {"train": {"tokens": 10, "lr": lr}, "storage": {"uri": str(folder)}})
    assert isinstance(spec, TrainSpec)
    return spec


def keep(folder: Path, spec: TrainSpec, step: int, shard: bytes) -> None:
    """A run with a checkpoint of one rank."""
    open_run(spec).close()
    store, key = open_store(str(folder)), f"{spec.name}/checkpoints/step-{step:08d}"
    store.put_bytes(f"{key}/rank-00000.safetensors", shard)
    about = ManifestFile(path="rank-00000.safetensors", size_bytes=len(shard), sha256=hashlib.sha256(shard).hexdigest())
    commit(store, key, Header(step, 1, 2, spec_hash(spec), "tokenizer", 1), [about])


def found(folder: Path, name: str) -> dict[str, tuple[bytes, str]]:
    """Of every whole checkpoint: its shard, and whose it says it is."""
    store = open_store(str(folder))
    keys = store.committed(f"{name}/checkpoints")
    return {
        key.rsplit("/", 1)[1]: (
            store.get_bytes(f"{key}/rank-00000.safetensors"),
            json.loads(store.get_bytes(f"{key}/header.json"))["spec_hash"],
        )
        for key in keys
    }


def begun(folder: Path, spec: TrainSpec) -> Run:
    run = Checkpoints(str(folder)).opened(spec, keep=False)
    assert run is not None
    run.close()
    return run


def test_a_member_goes_on_from_the_newest_checkpoint_of_its_source_as_a_run_of_its_own(tmp_path: Path) -> None:
    keep(tmp_path, spec_of(tmp_path, "a"), 4, b"a4")
    keep(tmp_path, spec_of(tmp_path, "a"), 8, b"a8")
    keep(tmp_path, spec_of(tmp_path, "b", 2e-3), 6, b"b6")
    after = spec_of(tmp_path, "b", 3e-3)

    Checkpoints(str(tmp_path)).stage("a", "b")
    run = begun(tmp_path, after)

    assert found(tmp_path, "b") == {"step-00000008": (b"a8", spec_hash(after))}
    assert (run.hash, taken_step(run)) == (spec_hash(after), 8)
    assert found(tmp_path, "a")["step-00000008"] == (b"a8", spec_hash(spec_of(tmp_path, "a")))
    assert Checkpoints(str(tmp_path)).opened(after, keep=False) is None  # it has begun: from now on it is its own


def test_a_death_while_a_checkpoint_is_taken_over_takes_it_over_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path, spec_of(tmp_path, "a"), 8, b"a8")
    keep(tmp_path, spec_of(tmp_path, "b"), 6, b"b6")
    after = spec_of(tmp_path, "b", 3e-3)
    Checkpoints(str(tmp_path)).stage("a", "b")
    seconds = itertools.count()
    monkeypatch.setattr("tigerbot.runs.time.strftime", lambda _: str(next(seconds)))  # a life is longer than one
    for there in ("open_run", "_adopt", "write_json"):
        with monkeypatch.context() as dying:
            dying.setattr(checkpoints, there, died)
            with pytest.raises(KeyboardInterrupt):
                Checkpoints(str(tmp_path)).opened(after, keep=False)

    begun(tmp_path, after)

    assert found(tmp_path, "b") == {"step-00000008": (b"a8", spec_hash(after))}


def test_a_source_that_has_just_taken_over_gives_what_it_took(tmp_path: Path) -> None:
    for name, step in (("a", 8), ("b", 6), ("c", 6)):
        keep(tmp_path, spec_of(tmp_path, name), step, name.encode())
    Checkpoints(str(tmp_path)).stage("a", "b")

    Checkpoints(str(tmp_path)).stage("b", "c")
    begun(tmp_path, spec_of(tmp_path, "c", 3e-3))

    assert found(tmp_path, "c")["step-00000008"][0] == b"a"


def test_a_trial_that_needs_less_memory_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    keep(tmp_path, spec_of(tmp_path, "a"), 8, b"a8")
    smaller = spec_of(tmp_path, "a", 3e-3)

    run = Checkpoints(str(tmp_path)).opened(smaller, keep=True)

    assert run is not None and found(tmp_path, "a") == {"step-00000008": (b"a8", spec_hash(smaller))}


def test_a_source_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="trial-0001 has no whole checkpoint"):
        Checkpoints(str(tmp_path)).stage("trial-0001", "trial-0002")


def died(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt

"""A run whose model has become another since does not go on: one line that names what changed, and nothing is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from small_corpus import Corpus, as_file, as_train

from tigerbot.cli import main
from tigerbot.errors import IdentityError
from tigerbot.models import build, load_tokenizer, save_model, tokenizer_hash
from tigerbot.runs import Run, open_run
from tigerbot.storage import open_store
from tigerbot_jobs.train.checkpoint import Header, checkpoint_key, commit, file_of, persist_file
from tigerbot_jobs.train.checks import checked
from tigerbot_jobs.train.given import WorkerJob
from tigerbot_jobs.train.goodput_text import LEDGER
from tigerbot_jobs.train.identity import check_same, fields_of, model_fields
from tigerbot_jobs.train.ledger import Ledger
from tigerbot_jobs.train.model import make_model

OTHERS = {
    "heads": ({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128}, "num_attention_heads was 4, now it is 2"),
    "rope": ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, "rope_theta was 10000.0, now it is 500.0"),
    "activation": ({"hidden_act": "gelu"}, "model.hidden_act was silu, now it is gelu"),
}  # fmt: skip


@pytest.fixture
def raw(corpus: Corpus, tmp_path: Path) -> dict[str, Any]:
    """A spec whose model is a folder."""
    save_model(build("tiny", 600, 1), load_tokenizer(corpus.folder / "tokenizer"), tmp_path / "base")
    return corpus.spec("kept", tmp_path) | {"model": {"path": str(tmp_path / "base")}}


def began(raw: dict[str, Any]) -> WorkerJob:
    """As a run leaves its folder that has trained: with steps in its ledger."""
    spec = as_train(raw)
    run = open_run(spec)
    job = checked(run, spec)
    run.close()
    ledger = Ledger(run.folder / LEDGER)
    ledger.write("steps", rows=[])
    ledger.close()
    return job


def keep_checkpoint(job: WorkerJob) -> None:
    store, key = open_store(job.spec.storage.uri), checkpoint_key(f"{job.spec.name}/checkpoints", 4)
    about = persist_file(store, key, memoryview(b"state"), file_of(0))
    tokenizer = tokenizer_hash(job.spec.model.path or "")
    model = model_fields(make_model(job.spec))
    commit(store, key, Header(4, 1, 2, job.hash, tokenizer, 1, data_hash=job.data_hash, model=model), [about])


def change(raw: dict[str, Any], config: dict[str, Any]) -> None:
    path = Path(raw["model"]["path"]) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize("changes", [[], ["scale.workers=3"]], ids=["same world", "another world"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_of_the_same_shapes_is_refused_in_one_line(
    raw: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    other: str,
    changes: list[str],
) -> None:
    keep_checkpoint(began(raw))
    (tmp_path / "kept" / LEDGER).unlink()  # as on another machine: only storage knows
    config, said = OTHERS[other]
    change(raw, config)
    monkeypatch.setattr("tigerbot_jobs.train.job.connect", lambda *_, **__: pytest.fail("a cluster was started"))
    monkeypatch.setattr(sys, "argv", ["tiger", "run", str(as_file(raw, tmp_path)), *(f"--set={c}" for c in changes)])

    with pytest.raises(SystemExit) as ended:
        main()

    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert "checkpoint kept/checkpoints/step-00000004: model." in line and said in line and "--replace" in line


def test_a_state_in_memory_of_another_model_is_refused_by_the_runs_folder(raw: dict[str, Any]) -> None:
    job = began(raw)
    change(raw, OTHERS["rope"][0])

    with pytest.raises(IdentityError, match=r"rope_theta was 10000.0, now it is 500.0") as refused:
        checked(Run(job.spec, job.hash, Path(job.folder)), job.spec)

    assert refused.value.where == job.folder


def test_a_run_that_has_not_made_a_step_may_still_change_its_model(raw: dict[str, Any]) -> None:
    job = began(raw)
    (Path(job.folder) / LEDGER).unlink()
    change(raw, OTHERS["heads"][0])

    checked(Run(job.spec, job.hash, Path(job.folder)), job.spec)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}], ids=["full", "lora"])
def test_the_driver_knows_of_a_model_it_never_loads_what_a_worker_finds(
    raw: dict[str, Any], lora: dict[str, Any] | None
) -> None:
    spec = as_train(raw | {"lora": lora})

    found = fields_of(spec)

    assert found == model_fields(make_model(spec))
    assert found["parameters"] and found["num_attention_heads"] == 4


def test_what_one_of_two_does_not_know_is_no_difference() -> None:
    check_same(
        {"model": {"heads": 4, "old": 1}, "data_hash": ""}, {"model": {"heads": 4, "new": 2}, "data_hash": "d"}, "x"
    )
    with pytest.raises(IdentityError, match=r"model\.heads was 4, now it is 2"):
        check_same({"model": {"heads": 4}}, {"model": {"heads": 2}}, "x")

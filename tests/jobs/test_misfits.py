"""Parts that do not belong together, as a user mixes them up: a tokenizer, a model, shards, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tigerbot.errors import DataError, ModelError, TigerError
from tigerbot.models import build, load_tokenizer, save_model
from tigerbot.runner import run_spec
from tigerbot.spec import TrainSpec, parse_spec
from tigerbot_jobs.data.tokenizer import train_tokenizer
from tigerbot_jobs.train.model import make_model

TEXTS = [f"The fox {i} sings. 狐狸{i}唱歌。老虎在山里走。" for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 300 tokens, and a tokenizer of more."""
    folder = tmp_path_factory.mktemp("misfits")
    train_tokenizer(TEXTS, 512, folder / "tokenizer")
    save_model(build("tiny", 300, 1), load_tokenizer(folder / "tokenizer"), folder / "model")
    return folder


def train(storage: Path, model: dict[str, Any], source: dict[str, Any]) -> TrainSpec:
    raw = {"kind": "train", "name": "t", "model": model, "data": {"sequence_length": 32, "train": [source]}}
    raw |= {"train": {"tokens": 256, "batch_tokens": 256}, "storage": {"uri": str(storage)}}
    spec = parse_spec(raw | {"tracking": {"uri": f"sqlite:///{storage}/mlflow.db"}})
    assert isinstance(spec, TrainSpec)
    return spec


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    model = {"path": str(folder / "model"), "tokenizer": str(folder / "tokenizer")}

    with pytest.raises(ModelError, match=r"the tokenizer has \d+ tokens, the model 300; use the tokenizer"):
        make_model(train(tmp_path, model, {"path": "t"}))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.jsonl", None, "missing.jsonl: no such file"),
        ("empty.jsonl", b"", "empty.jsonl: is empty"),
        ("binary.jsonl", b"\x7fELF\x00\x00\x01", "binary.jsonl: is a binary file"),
        ("rows.jsonl", b"nothing here is JSON\n" * 3, "rows.jsonl: holds no usable row"),
    ],
)
def test_a_training_file_that_cannot_be_used_is_one_line_before_anything_starts(
    folder: Path, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    spec = train(tmp_path, {"path": str(folder / "model")}, {"path": str(tmp_path / name), "format": "chat"})

    with pytest.raises(DataError) as refused:
        run_spec(spec)

    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "mlflow.db").exists()


def test_an_endpoint_that_is_not_there_ends_an_evaluation_with_one_line(tmp_path: Path) -> None:
    raw = {"kind": "eval", "name": "e", "url": "http://127.0.0.1:9", "questions": 2, "seeds": [1], "dials": [0.0]}
    raw |= {"creative_prompts": 1, "samples": 1, "storage": {"uri": str(tmp_path)}}

    with pytest.raises(TigerError, match=r"127.0.0.1:9.*no answer .*is the endpoint up"):
        run_spec(parse_spec(raw))

"""Storage that is a bucket: what a job found is there when it is done, and another machine finds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tigerbot import runner
from tigerbot.errors import StorageError
from tigerbot.runs import local_root
from tigerbot.spec import Spec, parse_spec
from tigerbot.storage import open_store
from tigerbot.tokens import TokenShards


def corpus(folder: Path, uri: str, **fields: Any) -> Spec:
    (folder / "rows.jsonl").write_text('{"text": "老虎在山里走。 A tiger walks."}\n', encoding="utf-8")
    raw = {"kind": "corpus", "name": "town", "tokenizer": {"vocab_size": 512}, "sequence_length": 16}
    raw |= {"sources": [{"name": "s", "path": str(folder / "rows.jsonl")}], "storage": {"uri": uri}}
    return parse_spec(raw | fields)


def machine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_another_machine_finds_what_a_job_left_in_the_bucket(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = corpus(tmp_path, bucket_uri)
    machine(tmp_path / "first", monkeypatch)
    result = runner.run_spec(spec)
    assert "town/tokens" in open_store(bucket_uri).committed("town")
    capsys.readouterr()

    second = machine(tmp_path / "second", monkeypatch)
    again = runner.run_spec(spec)

    assert again == result and "done already" in capsys.readouterr().out
    shards = TokenShards(second / local_root(spec) / "town/tokens/s")
    assert len(shards) >= 1 and (second / result["tokenizer"] / "tokenizer.json").exists()


def test_another_spec_of_that_name_is_not_taken_for_it(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path / "first", monkeypatch)
    runner.run_spec(corpus(tmp_path, bucket_uri))
    second = machine(tmp_path / "second", monkeypatch)
    longer = corpus(tmp_path, bucket_uri, sequence_length=32)

    runner.run_spec(longer)

    assert TokenShards(second / local_root(longer) / "town/tokens/s").sequence_length == 32


def test_a_bucket_that_cannot_be_used_is_said_before_the_work(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = machine(tmp_path / "first", monkeypatch)
    spec = corpus(tmp_path, "s3://nowhere/team")

    with pytest.raises(StorageError, match=r"s3://nowhere/team.*the bucket does not exist; make it"):
        runner.run_spec(spec)

    assert not (folder / local_root(spec) / "town/tokens").exists()

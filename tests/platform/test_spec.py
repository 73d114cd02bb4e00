"""Specs: every mistake is one line that says where, what, and what to write instead."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tigerbot.errors import SpecError
from tigerbot.spec import KINDS, TrainSpec, json_schema, load_spec, parse_spec, spec_difference, spec_hash

ROOT = Path(__file__).parents[2]
TRAIN = """\
# a comment
kind: train
name: base
model: {preset: tiny, tokenizer: ./tokenizer}
data:
  sequence_length: 64
  train:
    - {path: ./tokens}
train: {tokens: 5_000_000, lr: 3e-4}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "规格.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    spec = load_spec(written(tmp_path, TRAIN), ["train.batch_tokens=65_536", "train.lr=1e-3", "data.train.0.weight=2"])

    assert isinstance(spec, TrainSpec)
    assert spec.train.tokens == 5_000_000 and spec.train.batch_tokens == 65_536 and spec.train.lr == 1e-3
    assert spec.data.train[0].weight == 2


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (("lr: 3e-4", "lrr: 3e-4"), ["规格.yaml:9", "train.lrr: no such field", "did you mean lr?"]),
        (("kind: train", "kind: trian"), ["规格.yaml:2", "got 'trian'", "did you mean train?"]),
        (("tokens: 5_000_000", "tokens: many"), ["规格.yaml:9", "train.tokens: got 'many'"]),
        (("tokens: 5_000_000", "tokens: -1"), ["train.tokens: got -1", "greater than or equal to 1"]),
        (("preset: tiny", "preset: tiny, hub: x"), ["model", "wants exactly one of preset, path, hub, gguf"]),
        (("name: base", "name: 'Base Model'"), ["规格.yaml:3", "name: got 'Base Model'"]),
        (("  sequence_length: 64\n", "  sequence_length: [64\n"), ["is not YAML", "规格.yaml:"]),
        (("name: base\n", ""), ["name: is missing", "add it"]),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, change: tuple[str, str], wanted: list[str]) -> None:
    path = written(tmp_path, TRAIN.replace(*change))

    with pytest.raises(SpecError) as refused:
        load_spec(path)

    assert "\n" not in str(refused.value)
    for part in wanted:
        assert part in str(refused.value)


@pytest.mark.parametrize("override", ["train.lr", "=3", "train.lr.x=3", "data.train.7.weight=2"])
def test_a_wrong_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(SpecError, match="--set"):
        load_spec(written(tmp_path, TRAIN), [override])


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1, 2]", b"just text"])
def test_a_file_that_is_no_spec_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)

    with pytest.raises(SpecError, match=r"x\.yaml"):
        load_spec(path)


def test_the_command_exits_with_2_and_one_line(tmp_path: Path) -> None:
    for path in (written(tmp_path, TRAIN.replace("lr:", "lrr:")), tmp_path / "missing.yaml"):
        done = subprocess.run(
            [sys.executable, "-m", "tigerbot.cli", "run", str(path)], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert done.stderr.startswith("tiger: ") and len(done.stderr.strip().splitlines()) == 1


def test_where_and_how_a_run_runs_is_not_what_it_is() -> None:
    raw = {
        "kind": "train",
        "name": "x",
        "model": {"preset": "tiny"},
        "data": {"train": [{"path": "t"}]},
        "train": {"tokens": 100},
    }
    spec = parse_spec(raw)
    elsewhere = raw | {
        "scale": {"workers": [1, 8]},
        "storage": {"uri": "s3://b"},
        "fault_tolerance": {"max_failures": 9},
    }
    longer = parse_spec(raw | {"train": {"tokens": 200}})

    assert spec_hash(spec) == spec_hash(parse_spec(elsewhere))
    assert spec_hash(spec) != spec_hash(longer)
    assert spec_difference(spec.model_dump(), longer.model_dump()) == ["train.tokens: 100 -> 200"]


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=12), st.none() | st.integers() | st.text(max_size=8) | st.lists(st.integers())))
def test_no_mapping_breaks_the_parser(raw: dict) -> None:
    for kind in KINDS:
        with pytest.raises(SpecError):
            parse_spec(raw | {"kind": kind})


@pytest.mark.parametrize("kind", KINDS)
def test_the_schemas_that_are_checked_in_are_current(kind: str) -> None:
    kept = json.loads((ROOT / f"docs/schemas/{kind}.schema.json").read_text(encoding="utf-8"))

    assert kept == json_schema(kind), f"run: tiger spec schema {kind} > docs/schemas/{kind}.schema.json"


def test_every_spec_that_ships_is_valid() -> None:
    shipped = [*ROOT.glob("jobs/*.yaml"), *ROOT.glob("serve/*.yaml"), *ROOT.glob("jobs/tigerbot_jobs/demo/*.yaml")]

    assert {load_spec(path).kind for path in shipped} == set(KINDS)

"""Targets are tried on both ends of their space before anything starts; what is wrong is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import pytest
import torch
import yaml

from tigerbot.errors import SpecError
from tigerbot.spec import SweepSpec, parse_spec
from tigerbot_jobs.sweep.parameters import parameters
from tigerbot_jobs.sweep.preview import preview
from tigerbot_jobs.sweep.space import Space
from tigerbot_jobs.sweep.target import Target, halved, load_target, packed, unpack
from tigerbot_jobs.sweep.trials import numbers

TRAIN = {
    "kind": "train",
    "name": "t",
    "model": {"preset": "tiny"},
    "data": {"train": [{"path": "tokens"}], "validation": [{"path": "held-out"}]},
    "train": {"tokens": 1000, "batch_tokens": 100, "micro_batch": 8},
}


def loaded(folder: Path, train: dict[str, Any] | None = None, **fields: Any) -> Target:
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(TRAIN | (train or {})))
    raw = {"kind": "sweep", "name": "s", "target": str(path), "space": {"train.lr": {"choice": [1e-3]}}} | fields
    spec = parse_spec(raw)
    assert isinstance(spec, SweepSpec)
    return load_target(spec, Space(spec.space), threads=1, folder=folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": {"train.lrr": {"choice": [1e-3]}}}, r"train.lrr: no such field; did you mean lr\?"),
        ({"space": {"trian.lr": {"choice": [1e-3]}}}, r"trian: no such field; did you mean train\?"),
        ({"space": {"train.lr": {"uniform": [1e-3, 99]}}}, "train.lr: got 9"),
        ({"params": {"train.batchtokens": 5}}, r"did you mean batch_tokens\?"),
        ({"metric": "validation_los"}, r"training reports no validation_los; did you mean validation_loss\?"),
        (
            {"trial": "heavy", "scheduler": "pbt", "space": {"train.micro_batch": {"choice": [1, 2]}}},
            "space train.micro_batch: cannot change on the way of a population",
        ),
        ({"target": "no_such:thing"}, "cannot be imported"),
        ({"target": "json:no_such"}, "cannot be imported"),
        ({"target": "json:dumps", "trial": "heavy"}, "a heavy trial is a train spec"),
        ({"space": {"a": {"choice": [1]}, "train.lr": {"derive": "a * train.micro_batcch"}}}, "no field train.micro"),
    ],
)
def test_a_field_that_the_target_does_not_have_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        loaded(tmp_path, **fields)


DIGITS = {"target": "tigerbot_jobs.sweep.example:digits"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"space": {"momentumm": {"choice": [0.9]}}},
            r"space.momentumm: .* no such parameter; did you mean momentum\?",
        ),
        ({"space": {"lr": {"choice": [1]}}, "params": {"epoch": 9}}, r"params.epoch: .*; did you mean epochs\?"),
    ],
)
def test_a_parameter_that_a_function_does_not_take_is_named(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        loaded(tmp_path, **DIGITS, **fields)


def test_a_field_that_others_depend_on_needs_no_parameter(tmp_path: Path) -> None:
    space = {"doublings": {"int": [3, 7]}, "width": {"derive": "2 ** doublings"}, "optimizer": {"choice": ["a", "b"]}}
    space["momentum"] = {"uniform": [0, 1], "when": {"optimizer": "b"}}

    assert loaded(tmp_path, **DIGITS, space=space)


class Declared(TypedDict):
    lr: float
    decay: NotRequired[float]


def declares(params: Declared, report: Any) -> None:
    print(params)


def reads(params: Mapping[str, Any], report: Any) -> None:
    def inner() -> float:
        return params["lr"] * params.get("decay", 0.0)

    report({"loss": inner() if "wide" in params else 0.0})


def hands_on(params: Mapping[str, Any], report: Any) -> None:
    reads(params, report(params["lr"]))


def reads_nothing(params: Mapping[str, Any], report: Any) -> None:
    report({"loss": 0.0})


def reads_by_variable(params: Mapping[str, Any], report: Any) -> None:
    for name in ("lr", "decay"):
        report({"loss": params[name] + params["lr"]})


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (declares, {"lr", "decay"}),
        (reads, {"lr", "decay", "wide"}),
        (wraps(reads)(lambda *words: reads(*words)), {"lr", "decay", "wide"}),
        (hands_on, None),
        (reads_nothing, None),
        (reads_by_variable, None),
        (partial(reads, {}), None),
        (print, None),
    ],
)
def test_a_function_takes_what_it_declares_or_reads_and_anything_where_it_hands_all_on(
    function: Any, names: set[str] | None
) -> None:
    assert parameters(function) == names


def test_a_held_out_loss_wants_held_out_data(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="metric validation_loss: the target has no validation data"):
        loaded(tmp_path, {"data": {"train": [{"path": "x"}]}}, metric="validation_loss")


def test_a_derived_value_may_use_fields_of_the_train_spec(tmp_path: Path) -> None:
    space = {"train.batch_tokens": {"choice": [100, 200]}, "train.tokens": {"derive": "train.batch_tokens * 20"}}

    assert loaded(tmp_path, space=space).hash


def test_half_the_micro_batch_keeps_the_batch(tmp_path: Path) -> None:
    target = loaded(tmp_path)

    assert target.shrunk({"train.lr": 1e-3}) == {"train.micro_batch": 4}
    assert halved(str(tmp_path / "train.yaml"), {}, {"train.micro_batch": 1}) == {}


def test_a_folder_survives_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "a/step-1").mkdir(parents=True)
    (tmp_path / "a/step-1/shard").write_bytes(b"\0\1")

    unpack(packed(tmp_path / "a"), tmp_path / "b")

    assert (tmp_path / "b/step-1/shard").read_bytes() == b"\0\1"


def test_a_dry_run_shows_the_first_points_and_what_is_known_of_the_learning_rate(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    raw = {"kind": "sweep", "name": "s", "target": str(tmp_path / "train.yaml"), "trials": 6, "seeds": 2}
    spec = parse_spec(raw | {"space": {"train.lr": {"log_uniform": [1e-4, 1e-2]}}, "confirm": {"top": 2}})
    assert isinstance(spec, SweepSpec)

    lines = preview(spec)

    assert lines[:2] == ["6 trials, 3 configurations of 1 searched fields", "then the best 2 again, 3 fresh seeds each"]
    assert sum("first:" in line for line in lines) == 3 and any("Step Law" in line for line in lines)


def test_a_scalar_of_numpy_or_torch_is_a_number_and_nothing_else_is() -> None:
    scalars = {"a": np.float32(0.5), "b": torch.tensor(2), "c": np.array(3.0), "d": 4, "nan": np.float16("nan")}
    others = {"list": [1.0], "vector": np.ones(2), "text": "0.5", "truth": np.bool_(True), "nothing": None}

    found = numbers(scalars | others)

    assert math.isnan(found.pop("nan")) and found == {"a": 0.5, "b": 2.0, "c": 3.0, "d": 4.0}

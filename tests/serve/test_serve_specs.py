"""The specs that ship: every one is read, says what it is for, and fits the schema that is checked in."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from tigerbot.errors import SpecError
from tigerbot.spec import ServeSpec, json_schema, load_spec, parse_spec

ROOT = Path(__file__).parents[2]
SPECS = sorted((ROOT / "serve").glob("*.yaml"))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_a_shipped_spec_is_what_the_schema_and_the_types_take(path: Path) -> None:
    text = path.read_text()

    jsonschema.validate(yaml.safe_load(text), json_schema("serve"))

    assert isinstance(load_spec(path), ServeSpec)
    assert text.startswith("# ")


def test_there_is_a_spec_for_each_place() -> None:
    assert {path.stem for path in SPECS} >= {"ensemble", "one-gpu", "two-gpus", "cluster"}


def test_the_schema_that_is_checked_in_is_the_types_own() -> None:
    kept = json.loads((ROOT / "docs" / "schemas" / "serve.schema.json").read_text())

    assert kept == json_schema("serve")


def test_devices_are_for_two_full_models() -> None:
    members = {"base": "b", "creative": "c", "factual": "f", "devices": ["cuda:0", "cuda:1"]}

    with pytest.raises(SpecError, match="devices wants two full models"):
        parse_spec({"kind": "serve", "name": "s", "members": members})

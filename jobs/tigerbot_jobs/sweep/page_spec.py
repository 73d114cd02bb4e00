"""The recommended configuration as a YAML spec that can be submitted as it stands.

A sweep over a train spec gives that spec with the configuration's values set; one over a function gives a sweep of one
point. The text is read back as a spec before it is shown: what does not validate is shown as its fields alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tigerbot.errors import SpecError
from tigerbot.spec import load_spec, parse_spec

_KEPT = ("trial", "params", "metric", "mode", "cpus_per_trial", "gpus_per_trial", "storage", "tracking")


@dataclass(frozen=True)
class Ready:
    """A spec as text; `problem` says why it is only its fields, where it is."""

    text: str
    name: str
    problem: str = ""


def ready_spec(sweep: str, spec: Mapping[str, Any], params: Mapping[str, Any]) -> Ready:
    """The spec that runs one configuration of a sweep.

    Args:
        spec: the sweep's own, as it is kept in its folder; empty where there is none.
        params: of the configuration.
    """
    name = f"{sweep[:58]}-best"
    target = str(spec.get("target", ""))
    try:
        if target.endswith((".yaml", ".yml")):
            return Ready(_train(target, name, dict(spec.get("params") or {}) | dict(params)), name)
        if target:
            return Ready(_single(spec, name, params), name)
        problem = "the sweep's spec is not beside its journal"
    except SpecError as error:
        problem = str(error)
    return Ready(_dump(dict(params)), name, problem)


def _train(target: str, name: str, values: Mapping[str, Any]) -> str:
    changes = [f"{field}={json.dumps(value, ensure_ascii=False)}" for field, value in values.items()]
    loaded = load_spec(Path(target), [*changes, f"name={name}"])
    return _dump(loaded.model_dump(mode="json", exclude_unset=True))


def _single(spec: Mapping[str, Any], name: str, params: Mapping[str, Any]) -> str:
    one = {"kind": "sweep", "name": name, "target": spec["target"]}
    one |= {key: spec[key] for key in _KEPT if spec.get(key)}
    one["space"] = {field: {"choice": [value]} for field, value in params.items()}
    one |= {"trials": 1, "searcher": "random", "scheduler": "none"}
    parse_spec(one)
    return _dump(one)


def _dump(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), allow_unicode=True, sort_keys=False, default_flow_style=None, width=110)

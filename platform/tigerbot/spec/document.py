"""A spec file: read, `--set` applied, parsed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tigerbot.errors import SpecError
from tigerbot.spec.kinds import Spec, parse_spec


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """The typed spec in a YAML file, with `a.b=c` overrides applied (values are YAML).

    Raises:
        SpecError: the file is missing, is not YAML, or a field is wrong.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError(
            f"cannot be read ({error.strerror})", where=str(file), fix="give the path of a spec file"
        ) from None
    except UnicodeDecodeError:
        raise SpecError("is not UTF-8 text", where=str(file), fix="give the path of a YAML spec") from None
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise SpecError(
            f"is not YAML ({getattr(error, 'problem', error)})", where=where, fix="correct this line"
        ) from None
    if not isinstance(raw, dict):
        raise SpecError(
            f"wants a mapping of fields; got {type(raw).__name__}", where=str(file), fix="begin with `kind:`"
        )
    for override in overrides:
        _apply(raw, override)
    return parse_spec(raw, where=str(file), text=text)


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise SpecError(f"got {override!r}, wants field.subfield=value", where="--set", fix="e.g. --set train.lr=3e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError(f"the value of {path} is not YAML: {text!r}", where="--set", fix="quote it") from None
    node: Any = raw
    for key in keys[:-1]:
        node = _child(node, key, override)
    if isinstance(node, list):
        node[_index(node, keys[-1], override)] = value
    else:
        node[keys[-1]] = value


def _child(node: Any, key: str, override: str) -> Any:
    child = node[_index(node, key, override)] if isinstance(node, list) else node.setdefault(key, {})
    if child is None and isinstance(node, dict):
        child = node[key] = {}
    if not isinstance(child, dict | list):
        raise SpecError(f"{key} holds {child!r}, not a section", where=f"--set {override}", fix="set the field itself")
    return child


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise SpecError(f"got index {key!r}, wants 0..{len(node) - 1}", where=f"--set {override}", fix="name one item")
    return int(key)

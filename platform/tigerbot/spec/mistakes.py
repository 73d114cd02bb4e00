"""One line for what is wrong with a spec: file and line, field, what it got, what it wants, the nearest valid name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tigerbot.errors import SpecError
from tigerbot.spec.parts import Job


def spec_error(error: ValidationError, model: type[Job], raw: dict[str, Any], where: str, text: str) -> SpecError:
    problem = error.errors()[0]
    location = tuple(part for part in problem["loc"] if not _is_union_tag(part))
    field = ".".join(str(part) for part in location) or "spec"
    got = _shown(problem.get("input"))
    if problem["type"] == "extra_forbidden":
        names = _names_at(model, location[:-1])
        near = nearest(str(location[-1]), names)
        what, fix = f"{field}: no such field", f"did you mean {near}?" if near else f"wants one of {', '.join(names)}"
    elif problem["type"] == "missing":
        what, fix = f"{field}: is missing", "add it"
    else:
        wants = problem["msg"].removeprefix("Value error, ").replace("Input should be", "wants")
        what = f"{field}: {wants}" if "wants" in wants and "got" in wants else f"{field}: got {got}, {wants}"
        near = nearest(str(problem.get("input")), re.findall(r"'([^']+)'", problem["msg"]))
        fix = f"did you mean {near}?" if near else "correct this field"
    more = len(error.errors()) - 1
    return SpecError(what + (f" (and {more} more)" if more else ""), where=line_at(where, text, location), fix=fix)


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (
        part.startswith(("literal[", "tuple[", "constrained-", "function-")) or part in ("int", "float", "str")
    )


def _names_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        current = (
            _submodel(current.model_fields[part].annotation) if part in getattr(current, "model_fields", {}) else None
        )
        if current is None:
            return []
    return list(current.model_fields)


def _submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [_submodel(inner) for inner in get_args(annotation)]
    return next((inner for inner in found if inner), None)


def nearest(name: str, valid: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, valid, n=1, cutoff=0.5)), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def line_at(where: str, text: str, location: tuple[Any, ...]) -> str:
    line = _line_of(text, location)
    return f"{where}:{line}" if line else where


def _line_of(text: str, location: tuple[Any, ...]) -> int | None:
    """1-based line of the deepest part of `location` that stands in the YAML text."""
    if not text:
        return None
    node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
            if not found:
                return line
            key, node = found[0]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line

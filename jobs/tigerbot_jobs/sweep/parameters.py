"""Which parameters a function target takes: those that its `TypedDict` names, or those that its source reads.

    def target(params, report):                       # lr and momentum, and no others
        lr, momentum = params["lr"], params.get("momentum", 0.0)

    class Params(TypedDict): lr: float; momentum: NotRequired[float]
    def target(params: Params, report): train(**params)

A target that declares nothing and reads nothing, or hands `params` on as a whole, may take anything.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import typing
from collections.abc import Callable, Mapping
from typing import Any

from tigerbot.errors import SpecError
from tigerbot_jobs.sweep.space import Space, near

ALWAYS = "seed"


def check_parameters(function: Callable[..., Any], space: Space, fixed: Mapping[str, Any]) -> None:
    """Raises: SpecError: the space, or what is fixed, names a parameter that the function does not take.

    A name that an expression or a condition of the space uses needs no target.
    """
    taken = parameters(function)
    if taken is None:
        return
    for section, names in (("space", space.names), ("params", fixed)):
        for name in names:
            if name not in taken | space.used | {ALWAYS}:
                where = f"{section}.{name}"
                raise SpecError("the target takes no such parameter", where=where, fix=near(name, sorted(taken)))


def parameters(function: Callable[..., Any]) -> set[str] | None:
    """The names that a target takes; None where it may take any."""
    function = inspect.unwrap(function)
    try:
        first = next(iter(inspect.signature(function).parameters))
    except (TypeError, ValueError, StopIteration):
        return None
    try:
        declared = typing.get_type_hints(function).get(first)
    except Exception:  # an annotation that only a type checker can read
        declared = None
    return set(declared.__annotations__) if typing.is_typeddict(declared) else _read(function, first)


def _read(function: Callable[..., Any], params: str) -> set[str] | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == params]
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    names = [_name_read(use, parents) for use in uses]
    return {name for name in names if name is not None} if names and None not in names else None


def _name_read(use: ast.Name, parents: Mapping[ast.AST, ast.AST]) -> str | None:
    """The name in `params["name"]`, `params.get("name")` or `"name" in params`; None for any other use."""
    match parents[use]:
        case ast.Subscript(value=value, slice=ast.Constant(value=str(name))) if value is use:
            return name
        case ast.Compare(left=ast.Constant(value=str(name)), ops=[ast.In() | ast.NotIn()]):
            return name
        case ast.Attribute(attr="get") as get:
            match parents[get]:
                case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if func is get:
                    return name
    return None

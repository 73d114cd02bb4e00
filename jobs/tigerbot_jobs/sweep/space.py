"""The space of a sweep, from its spec to Tune's distributions: `{lr: {log_uniform: [1e-5, 1e-2]}}`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tigerbot.errors import SpecError

_BOUNDED = ("uniform", "log_uniform", "int", "log_int")


def tune_space(space: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Tune's distribution of every field.

    Raises:
        SpecError: an unknown kind, or bounds that are none.
    """
    if not space:
        raise SpecError("names no field", where="space", fix="e.g. train.lr: {log_uniform: [1e-4, 1e-2]}")
    return {field: _distribution(field, kinds) for field, kinds in space.items()}


def grid_points(space: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """The values of every field for a grid, where only `choice` can stand.

    Raises:
        SpecError: a field is not a choice.
    """
    tune_space(space)
    for field, kinds in space.items():
        if "choice" not in kinds:
            raise SpecError("a grid wants a choice", where=f"space.{field}", fix="list the values, or use tpe")
    return {field: kinds["choice"] for field, kinds in space.items()}


def _distribution(field: str, kinds: dict[str, Any]) -> Any:
    from ray import tune

    makers: dict[str, Callable[..., Any]] = {
        "uniform": tune.uniform,
        "log_uniform": tune.loguniform,
        "int": lambda low, high: tune.randint(low, high + 1),
        "log_int": lambda low, high: tune.lograndint(low, high + 1),
        "choice": lambda *values: tune.choice(list(values)),
    }
    where = f"space.{field}"
    if len(kinds) != 1 or next(iter(kinds)) not in makers:
        raise SpecError(f"got {', '.join(kinds) or 'nothing'}, wants one of {', '.join(makers)}", where=where)
    kind, given = next(iter(kinds.items()))
    if not isinstance(given, list) or not given:
        raise SpecError(f"{kind} wants a list; got {given!r}", where=where, fix="e.g. [1e-4, 1e-2]")
    values = [_number(value) for value in given]
    if kind in _BOUNDED:
        _check_bounds(kind, values, where)
    return makers[kind](*values)


def _check_bounds(kind: str, values: list[Any], where: str) -> None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if len(values) != 2 or not numbers or not values[0] < values[1]:
        raise SpecError(
            f"{kind} wants [low, high] with low < high; got {values}", where=where, fix="correct the bounds"
        )
    if kind.startswith("log") and values[0] <= 0:
        raise SpecError(f"{kind} wants bounds above 0; got {values}", where=where, fix="raise the lower bound")
    if kind.endswith("int") and not all(isinstance(value, int) for value in values):
        raise SpecError(f"{kind} wants whole numbers; got {values}", where=where, fix="correct the bounds")


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as text: take it for the number it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value

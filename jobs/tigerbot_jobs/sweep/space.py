"""The space of a sweep: what can be set, under which conditions, and what follows from it.

    train.lr: {log_uniform: [1e-5, 1e-2]}                      # uniform, log_uniform, int, log_int, choice
    train.betas: {choice: [[0.9, 0.95], [0.9, 0.99]], when: {train.optimizer: adamw}}
    train.tokens: {derive: "20 * train.batch_tokens"}

A point of the space is drawn field by field, conditions after what they depend on, derived values last; who draws
(a generator, a quasi-random sequence, Optuna) is the searcher's. This module knows nothing about targets.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tigerbot.errors import SpecError
from tigerbot_jobs.sweep.arithmetic import Expression

BOUNDED = ("uniform", "log_uniform", "int", "log_int")
KINDS = (*BOUNDED, "choice", "derive")


@dataclass(frozen=True)
class Dimension:
    """One field that is drawn. `values` are its bounds, or its choices; `when` names the values others must have."""

    name: str
    kind: str
    values: tuple[Any, ...]
    when: Mapping[str, tuple[Any, ...]]

    def at(self, unit: float) -> Any:
        """The value at a place in [0, 1)."""
        if self.kind == "choice":
            return self.values[min(int(unit * len(self.values)), len(self.values) - 1)]
        low, high = self.values
        if self.kind == "uniform":
            return low + (high - low) * unit
        if self.kind == "log_uniform":
            return min(max(math.exp(math.log(low) + (math.log(high) - math.log(low)) * unit), low), high)
        if self.kind == "int":
            return min(low + int((high - low + 1) * unit), high)
        return min(int(math.exp(math.log(low) + (math.log(high + 1) - math.log(low)) * unit) + 1e-9), high)

    def holds(self, value: Any) -> bool:
        """Whether a value is one of this field's."""
        if self.kind == "choice":
            return any(_same(value, choice) for choice in self.values)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.values[0] <= value <= self.values[1] and (_real(self.kind) or value == int(value))

    def place(self, value: Any) -> int:
        """The index of a choice."""
        return next(at for at, choice in enumerate(self.values) if _same(value, choice))


class Space:
    """The fields of a space, in an order in which they can be drawn. `names` has the derived ones too.

    Raises:
        SpecError: a field is none, or can never be drawn.
    """

    def __init__(self, raw: Mapping[str, Mapping[str, Any]]) -> None:
        if not raw:
            raise SpecError("names no field", where="space", fix="e.g. train.lr: {log_uniform: [1e-4, 1e-2]}")
        self.names = list(raw)
        drawn = {name: _dimension(name, kinds) for name, kinds in raw.items() if "derive" not in kinds}
        self.dimensions = _ordered(drawn)
        self._derived = {name: _expression(name, kinds) for name, kinds in raw.items() if "derive" in kinds}
        if not self.dimensions:
            raise SpecError("every field is derived", where="space", fix="give one a distribution or choices")
        self._check_conditions()

    @property
    def used(self) -> set[str]:
        """Names that other fields depend on, by an expression or a condition."""
        conditions = {other for dimension in self.dimensions for other in dimension.when}
        return conditions.union(*(expression.names for expression in self._derived.values()))

    def draw(self, pick: Callable[[Dimension], Any], fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A point: `pick` gives the value of each field whose conditions hold. `fixed` may stand in expressions."""
        values: dict[str, Any] = {}
        for dimension in self.dimensions:
            if all(any(_same(values.get(n), w) for w in wants) for n, wants in dimension.when.items()):
                values[dimension.name] = pick(dimension)
        return {name: value for name, value in self._with_derived(values, fixed or {}).items() if name in self.names}

    def at(self, units: Sequence[float], fixed: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The point at a place in the unit cube, one coordinate a dimension."""
        where = dict(zip((d.name for d in self.dimensions), units, strict=True))
        return self.draw(lambda dimension: dimension.at(where[dimension.name]), fixed)

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Whether a point, of another sweep maybe, is one of this space."""
        try:
            mine = self.draw(lambda dimension: _held(dimension, params))
        except LookupError:
            return False
        return all(name in params for name in mine if name not in self._derived)

    def grid(self, fixed: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Every combination of the choices, each once.

        Raises:
            SpecError: a field is not a choice.
        """
        for dimension in self.dimensions:
            if dimension.kind != "choice":
                where = f"space.{dimension.name}"
                raise SpecError("a grid wants a choice", where=where, fix="list the values, or use another searcher")
        points: dict[str, dict[str, Any]] = {}
        for combination in itertools.product(*(d.values for d in self.dimensions)):
            chosen = dict(zip((d.name for d in self.dimensions), combination, strict=True))
            point = self.draw(lambda dimension, chosen=chosen: chosen[dimension.name], fixed)
            points.setdefault(canonical(point), point)
        return list(points.values())

    def check_names(self, fixed: Mapping[str, Any]) -> None:
        """Raises: SpecError: an expression names a field that neither the space nor the fixed fields have."""
        known = [*self.names, *fixed]
        for name, expression in self._derived.items():
            for wanted in sorted(expression.names - {*known}):
                raise SpecError(f"derive: there is no field {wanted}", where=f"space.{name}", fix=near(wanted, known))

    def _with_derived(self, values: dict[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
        known = {**fixed, **values}
        left = dict(self._derived)
        while ready := [name for name, expression in left.items() if expression.names <= known.keys()]:
            for name in ready:
                known[name] = left.pop(name).value(known)
        return {name: known[name] for name in self.names if name in known and (name in values or name in self._derived)}

    def _check_conditions(self) -> None:
        by_name = {dimension.name: dimension for dimension in self.dimensions}
        needs: dict[str, dict[str, list[Any]]] = {}  # of every field: what others must be for it to be drawn
        for dimension in self.dimensions:
            mine: dict[str, list[Any]] = {}
            for other, wants in dimension.when.items():
                where = f"space.{dimension.name}.when.{other}"
                for name, values in (*needs[other].items(), (other, wants)):
                    possible = [v for v in values if by_name[name].holds(v)]
                    if not possible:
                        what, fix = f"{name} is never {_either(values)}", f"it is one of {list(by_name[name].values)}"
                        raise SpecError(f"never holds: {what}", where=where, fix=fix)
                    both = [v for v in possible if any(_same(v, one) for one in mine.get(name, possible))]
                    if not both:
                        what = f"{name} would be {_either(values)}, and {_either(mine[name])} for another condition"
                        raise SpecError(f"never holds: {what}", where=where, fix="take one of the two away")
                    mine[name] = both
            needs[dimension.name] = mine
        for name, expression in self._derived.items():
            if name in expression.names:
                raise SpecError("derive: is derived from itself", where=f"space.{name}", fix="name other fields")


def canonical(params: Mapping[str, Any]) -> str:
    """One text for one point."""
    return json.dumps(dict(params), sort_keys=True, ensure_ascii=False)


def near(name: str, valid: Sequence[str]) -> str:
    """The hint of a message about a name that is none."""
    found = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else f"wants one of {', '.join(valid)}"


def _either(values: Sequence[Any]) -> str:
    return " or ".join(map(str, values))


def _held(dimension: Dimension, params: Mapping[str, Any]) -> Any:
    if dimension.name not in params or not dimension.holds(params[dimension.name]):
        raise LookupError(dimension.name)
    return params[dimension.name]


def _ordered(drawn: dict[str, Dimension]) -> list[Dimension]:
    """Conditions after what they depend on."""
    order: list[Dimension] = []
    left = dict(drawn)
    for dimension in drawn.values():
        for other in dimension.when:
            if other not in drawn:
                where = f"space.{dimension.name}.when"
                raise SpecError(f"there is no drawn field {other}", where=where, fix=near(other, list(drawn)))
    while left:
        ready = [d for d in left.values() if not any(other in left for other in d.when)]
        if not ready:
            where = f"space.{next(iter(left))}.when"
            raise SpecError("conditions go in a circle", where=where, fix="let one of them stand alone")
        order += ready
        left = {name: d for name, d in left.items() if d not in ready}
    return order


def _dimension(name: str, raw: Mapping[str, Any]) -> Dimension:
    where = f"space.{name}"
    kinds = [kind for kind in raw if kind != "when"]
    if len(kinds) != 1 or kinds[0] not in KINDS:
        hint = near(kinds[0], KINDS) if len(kinds) == 1 else "e.g. {log_uniform: [1e-4, 1e-2]}"
        raise SpecError(f"got {', '.join(kinds) or 'nothing'}, wants one of {', '.join(KINDS)}", where=where, fix=hint)
    kind, given = kinds[0], raw[kinds[0]]
    if not isinstance(given, list) or not given:
        raise SpecError(f"{kind} wants a list; got {given!r}", where=where, fix="e.g. [1e-4, 1e-2]")
    values = tuple(_number(value) for value in given)
    if kind in BOUNDED:
        _check_bounds(kind, values, where)
    when = raw.get("when", {})
    if not isinstance(when, Mapping):
        raise SpecError(
            f"when wants field: value; got {when!r}", where=where, fix="e.g. when: {train.optimizer: adamw}"
        )
    wants = {n: tuple(map(_number, v)) if isinstance(v, list) else (_number(v),) for n, v in when.items()}
    return Dimension(name, kind, values, wants)


def _expression(name: str, raw: Mapping[str, Any]) -> Expression:
    if len(raw) != 1:
        raise SpecError("derive stands alone", where=f"space.{name}", fix="what it is derived from has the conditions")
    return Expression(raw["derive"], f"space.{name}")


def _check_bounds(kind: str, values: tuple[Any, ...], where: str) -> None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    shown = list(values)
    if len(values) != 2 or not numbers or not values[0] < values[1] or not all(map(math.isfinite, values)):
        what = f"{kind} wants [low, high] with low < high; got {shown}"
        raise SpecError(what, where=where, fix="correct the bounds")
    if kind.startswith("log") and values[0] <= 0:
        raise SpecError(f"{kind} wants bounds above 0; got {shown}", where=where, fix="raise the lower bound")
    if kind.endswith("int") and not all(isinstance(value, int) for value in values):
        raise SpecError(f"{kind} wants whole numbers; got {shown}", where=where, fix="correct the bounds")


def _number(value: Any) -> Any:
    """YAML reads 1e-3 as text: take it for the number it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _real(kind: str) -> bool:
    return kind in ("uniform", "log_uniform")


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)

"""The parameters of a sweep as axes: numbers, numbers over orders of magnitude, or a few choices, placed from 0 to 1."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tigerbot_jobs.sweep.analysis import History, Trial

_FEW = 6  # numbers that take no more values than this are choices
_EDGE = 0.1


@dataclass(frozen=True)
class Axis:
    """One parameter. `low` and `high` are the space's where it said them, else the data's.

    Attributes:
        choices: the values as JSON, in order; empty for numbers.
        conditional: some trials do not have it.
        bounded: the bounds are the space's, so that a value can be near an edge.
    """

    name: str
    low: float
    high: float
    log: bool
    choices: tuple[str, ...]
    conditional: bool
    bounded: bool

    def place(self, params: Mapping[str, Any]) -> float | None:
        """Where a trial lies on it, 0 to 1; None where it has no such parameter or another kind of value."""
        if self.name not in params:
            return None
        value = params[self.name]
        if self.choices:
            text = _text(value)
            return (self.choices.index(text) + 0.5) / len(self.choices) if text in self.choices else None
        if not _is_number(value) or (self.log and value <= 0):
            return None
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (at - low) / (high - low)

    def edge(self, params: Mapping[str, Any]) -> str:
        """`low` or `high` where a trial lies within a tenth of a bound of the space, else nothing."""
        place = self.place(params)
        if place is None or self.choices or not self.bounded:
            return ""
        return "low" if place <= _EDGE else "high" if place >= 1 - _EDGE else ""


def axes(history: History, space: Mapping[str, Any]) -> list[Axis]:
    """The parameters that took more than one value, in the order of the first trial; `space` is the sweep spec's."""
    trials = history.searched
    names = dict.fromkeys(name for trial in trials for name in trial.params if not _derived(space.get(name)))
    found = (_axis(name, trials, space.get(name)) for name in names)
    return [axis for axis in found if axis is not None]


def shown(value: Any) -> str:
    """A parameter's value in few characters."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else _text(value)


def _axis(name: str, trials: Sequence[Trial], told: Any) -> Axis | None:
    values = [trial.params[name] for trial in trials if name in trial.params]
    distinct = {_text(value): value for value in values}
    if len(distinct) < 2:
        return None
    conditional = len(values) < len(trials)
    bounds = _bounds(told)
    numbers = [float(value) for value in values if _is_number(value)]
    if len(numbers) < len(values) or (bounds is None and len(distinct) <= _FEW):
        return Axis(
            name, 0, 1, False, tuple(sorted(distinct, key=lambda text: _order(distinct[text]))), conditional, True
        )
    low, high = min(numbers), max(numbers)
    log = low > 0 and (bounds[2] if bounds else _spans_orders(numbers))
    if bounds is not None:
        low, high, log = min(low, bounds[0]), max(high, bounds[1]), log and bounds[0] > 0
    return Axis(name, low, high, log, (), conditional, bounds is not None)


def _spans_orders(numbers: list[float]) -> bool:
    """Whether numbers look drawn by their logarithm: a uniform draw's 95th percentile is 19 times its 5th at most."""
    ordered = sorted(numbers)
    return ordered[int(0.95 * (len(ordered) - 1))] / ordered[int(0.05 * (len(ordered) - 1))] >= 30


def _bounds(told: Any) -> tuple[float, float, bool] | None:
    """(low, high, log) of `{log_uniform: [low, high]}` and the like."""
    kinds = [kind for kind in told if kind != "when"] if isinstance(told, Mapping) else []
    if len(kinds) != 1:
        return None
    kind, values = kinds[0], told[kinds[0]]
    if kind == "choice" or not isinstance(values, list) or len(values) < 2:
        return None
    try:
        low, high = float(values[0]), float(values[1])
    except (TypeError, ValueError):
        return None
    return (low, high, str(kind).startswith("log")) if low < high else None


def _derived(told: Any) -> bool:
    """Whether a value follows from others: then it has no importance of its own."""
    return isinstance(told, Mapping) and "derive" in told


def _order(value: Any) -> tuple[int, float, str]:
    return (0, float(value), "") if _is_number(value) else (1, 0.0, _text(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)

"""What the answers are worth: factual accuracy and diversity per dial, with intervals.

Accuracy is looked up in the closed world, not judged. Diversity counts distinct answers among the valid ones (those
the creative grammars recognise) over all answers asked for, so that noise does not win.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class DialRow:
    """One row of the table. `w_mean` is the mean weight of the creative member."""

    dial: float
    example: str
    accuracy: Interval
    diversity: Interval
    valid: float
    w_mean: float | None


def bootstrap(values: Sequence[float], *, seed: int = 1, draws: int = 10_000) -> Interval:
    """Mean of values with a percentile bootstrap interval over them."""
    array = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    low, high = np.quantile(array[picks].mean(axis=1), (0.025, 0.975))
    return Interval(float(array.mean()), float(low), float(high))


def paired(a: Sequence[float], b: Sequence[float], *, seed: int = 1) -> Interval:
    """Mean of `a - b` over the same items, with its interval: a claim holds when the interval excludes zero."""
    return bootstrap(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), seed=seed)  # type: ignore[arg-type]


def per_item(keys: Sequence[Any], values: Sequence[float]) -> dict[Any, float]:
    """Mean value of each key (an item over its seeds), in the order keys first appear."""
    groups: defaultdict[Any, list[float]] = defaultdict(list)
    for key, value in zip(keys, values, strict=True):
        groups[key].append(value)
    return {key: float(np.mean(group)) for key, group in groups.items()}


def distinct_valid(texts: Sequence[str], valid: Sequence[bool]) -> float:
    """Distinct valid texts over all texts: 1.0 when every answer is valid and new."""
    return len({text.strip() for text, good in zip(texts, valid, strict=True) if good}) / max(len(texts), 1)


def as_dict(row: DialRow) -> dict[str, Any]:
    return asdict(row)

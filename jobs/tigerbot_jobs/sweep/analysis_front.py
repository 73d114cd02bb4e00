"""Trials with several objectives: who is on the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tigerbot_jobs.sweep.analysis import History, Trial


@dataclass(frozen=True)
class Standing:
    """A trial with its metric and its other objectives, in the order of the spec; `front` when none beats it in all."""

    trial: Trial
    values: tuple[float, ...]
    front: bool


def fronts(history: History, objectives: Mapping[str, str]) -> list[Standing]:
    """The trials that reported every objective; the further ones count as in the last point of their curve."""
    signs = [1.0 if mode == "min" else -1.0 for mode in (history.mode, *objectives.values())]
    rows = []
    for trial in (one for one in history.searched if one.status == "done"):
        last = history.curves[trial.name].last if trial.name in history.curves else {}
        values = [trial.metric, *(last.get(name) for name in objectives)]
        numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
        if len(numbers) == len(values):
            rows.append((trial, tuple(numbers)))
    if not rows:
        return []
    costs = np.array([values for _, values in rows]) * signs
    beaten = [bool(np.any(np.all(costs <= one, axis=1) & np.any(costs < one, axis=1))) for one in costs]
    return [Standing(trial, values, not lost) for (trial, values), lost in zip(rows, beaten, strict=True)]

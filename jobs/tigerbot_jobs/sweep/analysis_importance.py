"""Which parameters mattered: fANOVA and PED-ANOVA, as optuna computes them, each named for what it is.

fANOVA (a random forest over all trials) says how much of the metric's variance a parameter explains anywhere in the
space; PED-ANOVA says how much it matters for being among the best tenth. Both speak of the trials they were given, and
a searcher that favours good regions gives them a biased picture: the page says so. Below 50 trials there is no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tigerbot_jobs.sweep.analysis import History, Trial
from tigerbot_jobs.sweep.analysis_axes import Axis

LEAST = 50
MOST, FORESTED = 1000, 400  # trials looked at: more say the same and take long
_TREES, _RESAMPLES = 24, 20


@dataclass(frozen=True)
class Importance:
    """One parameter: shares by both methods (each sums to 1), and the 90% interval of PED-ANOVA over resampled trials."""

    name: str
    fanova: float
    ped: float
    ped_low: float
    ped_high: float


def importances(history: History, axes: Sequence[Axis], seed: int = 0) -> list[Importance]:
    """The parameters that every trial has, the most important first; nothing with fewer than `LEAST` trials, or where all are alike."""
    import optuna

    shared = [axis for axis in axes if not axis.conditional]
    trials = [t for t in history.searched if all(axis.place(t.params) is not None for axis in shared)]
    if len(trials) < LEAST or not shared or len({trial.metric for trial in trials}) < 2:
        return []
    rng = np.random.default_rng(seed)
    trials = _some(trials, rng, min(len(trials), MOST))
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        forest = _shares(_fanova(seed), history, _some(trials, rng, min(len(trials), FORESTED)), shared)
        ped = _shares(_ped(), history, trials, shared)
        again = [_shares(_ped(), history, _drawn(trials, rng), shared) for _ in range(_RESAMPLES)]
    finally:
        optuna.logging.set_verbosity(verbosity)
    found = []
    for axis in shared:
        low, high = np.percentile([one[axis.name] for one in again], [5, 95])
        found.append(Importance(axis.name, forest[axis.name], ped[axis.name], float(low), float(high)))
    return sorted(found, key=lambda one: -one.fanova)


def _fanova(seed: int) -> Any:
    from optuna.importance import FanovaImportanceEvaluator

    return FanovaImportanceEvaluator(n_trees=_TREES, max_depth=32, seed=seed)


def _ped() -> Any:
    from optuna.importance import PedAnovaImportanceEvaluator

    return PedAnovaImportanceEvaluator()


def _shares(evaluator: Any, history: History, trials: Sequence[Trial], axes: Sequence[Axis]) -> dict[str, float]:
    import optuna

    distributions: dict[str, Any] = {}
    for axis in axes:
        if axis.choices:
            distributions[axis.name] = optuna.distributions.CategoricalDistribution(tuple(range(len(axis.choices))))
        else:
            distributions[axis.name] = optuna.distributions.FloatDistribution(0.0, 1.0)
    study = optuna.create_study(direction="minimize" if history.mode == "min" else "maximize")
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={axis.name: _coded(axis, trial) for axis in axes},
                distributions=distributions,
                value=trial.metric,
            )
            for trial in trials
        ]
    )
    found = evaluator.evaluate(study, params=[axis.name for axis in axes])
    total = sum(found.values()) or 1.0
    return {axis.name: float(found.get(axis.name, 0.0) / total) for axis in axes}


def _coded(axis: Axis, trial: Trial) -> float | int:
    """A value as optuna takes it: numbers by their place, so that a logarithmic one is spread as it was drawn."""
    place = axis.place(trial.params)
    assert place is not None
    return int(place * len(axis.choices)) if axis.choices else min(1.0, max(0.0, place))


def _some(trials: Sequence[Trial], rng: np.random.Generator, count: int) -> list[Trial]:
    return [trials[at] for at in rng.choice(len(trials), count, replace=False)]


def _drawn(trials: Sequence[Trial], rng: np.random.Generator) -> list[Trial]:
    return [trials[at] for at in rng.integers(0, len(trials), len(trials))]

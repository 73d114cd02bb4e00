"""What the best configurations are worth: their value in the search beside that with fresh seeds.

The best of many noisy values is better than the configuration behind it (the winner's curse): it was chosen for its luck
as well. Fresh seeds had no part in the choice, so their mean is fair. A pure module: it takes a history, and gives the
same answer every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tigerbot_jobs.sweep.analysis import History, Trial

_DRAWS = 4000
TOP = 10  # configurations that are compared by their fresh seeds: the best of thousands of means is lucky again
_ENOUGH = 2  # fresh seeds from which a configuration's mean is believed more than its value in the search


@dataclass(frozen=True)
class Rerun:
    """A configuration of the search and what fresh seeds made of it.

    Attributes:
        mean, low, high: of the fresh seeds, with the t-interval of their mean at 95%; NaN where there are too few.
        chance: that no other configuration here is better; None with fewer than two that have intervals.
    """

    trial: Trial
    searched: float
    fresh: tuple[float, ...]
    mean: float
    low: float
    high: float
    chance: float | None = None

    @property
    def curse(self) -> float:
        """Fresh mean minus search value: above 0 for `min`, below 0 for `max`, where the search flattered."""
        return self.mean - self.searched


@dataclass(frozen=True)
class Recommendation:
    """The configuration to go on with. `rerun` is None where no fresh seeds vouch for it."""

    trial: Trial
    value: float
    rerun: Rerun | None


def reruns(history: History, seed: int = 0) -> list[Rerun]:
    """The best `TOP` configurations of those that ran with fresh seeds, best fresh mean first."""
    fresh = _fresh(history)
    chosen = [trial for trial in history.best(len(history.searched)) if trial.config in fresh][:TOP]
    found = [_rerun(trial, fresh[trial.config]) for trial in chosen]
    found.sort(key=lambda one: history.key(one.mean))
    chances = _chances(history, found, seed)
    return [replace(one, chance=chances.get(one.trial.config)) for one in found]


def noise(history: History) -> float | None:
    """Standard deviation between seeds of one configuration, pooled; None where no configuration ran twice."""
    groups = [values for values in _fresh(history).values() if len(values) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return None
    return math.sqrt(sum((len(group) - 1) * float(np.var(group, ddof=1)) for group in groups) / freedom)


def expected_luck(count: int) -> float:
    """How far the best of `count` equally good configurations lies above them, in standard deviations of the noise."""
    from scipy.stats import norm

    return float(norm.ppf((count - 0.375) / (count + 0.25))) if count > 1 else 0.0


def recommended(history: History, seed: int = 0) -> Recommendation | None:
    """The best configuration by fresh mean where fresh seeds ran, else by its value in the search."""
    vouched = [one for one in reruns(history, seed) if len(one.fresh) >= _ENOUGH]
    if vouched:
        return Recommendation(vouched[0].trial, vouched[0].mean, vouched[0])
    best = history.best(1)
    if not best or best[0].metric is None:
        return None
    return Recommendation(best[0], best[0].metric, None)


def _fresh(history: History) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for trial in history.trials.values():
        if trial.fresh and trial.metric is not None:
            found.setdefault(trial.config, []).append(trial.metric)
    return found


def _rerun(trial: Trial, values: Sequence[float]) -> Rerun:
    mean, half = float(np.mean(values)), math.nan
    if len(values) > 1:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1)) * _error(values)
    assert trial.metric is not None
    return Rerun(trial, trial.metric, tuple(values), mean, mean - half, mean + half)


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _chances(history: History, found: Sequence[Rerun], seed: int) -> dict[str, float]:
    """How often each is the best when every mean is drawn from its t-distribution."""
    sure = [one for one in found if len(one.fresh) > 1]
    if len(sure) < 2:
        return {}
    rng = np.random.default_rng(seed)
    draws = np.array([one.mean + _error(one.fresh) * rng.standard_t(len(one.fresh) - 1, _DRAWS) for one in sure])
    winners = np.argmin(draws if history.mode == "min" else -draws, axis=0)
    return {one.trial.config: float(np.mean(winners == at)) for at, one in enumerate(sure)}

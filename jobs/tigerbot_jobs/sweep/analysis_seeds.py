"""What the best configurations are worth: their value in the search beside that with fresh seeds.

The best of many noisy values is better than the configuration behind it (the winner's curse): it was chosen for its luck
as well. Fresh seeds had no part in the choice, so their mean is fair. A pure module: it takes a history, and gives the
same answer every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from tigerbot_jobs.sweep.analysis import History, Trial

_DRAWS = 4000


@dataclass(frozen=True)
class Configuration:
    """A configuration in the search: the trials of its seeds, and the mean of their values.

    `whole`: every seed ran to its end. What was stopped on the way is no rival to what was not.
    """

    trials: tuple[Trial, ...]
    value: float
    whole: bool

    @property
    def trial(self) -> Trial:
        return self.trials[0]


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


def configurations(history: History) -> list[Configuration]:
    """What the search tried, best first: by the mean over seeds, those that ran whole before those that did not."""
    seeds: dict[str, set[int]] = {}
    for trial in history.trials.values():
        if not trial.fresh:
            seeds.setdefault(trial.config, set()).add(trial.seed)
    each = max(map(len, seeds.values()), default=1)
    groups: dict[str, list[Trial]] = {}
    for trial in history.searched:
        groups.setdefault(trial.config, []).append(trial)
    found = []
    for trials in groups.values():
        value = float(np.mean([trial.metric for trial in trials if trial.metric is not None]))
        found.append(Configuration(tuple(trials), value, sum(t.status == "done" for t in trials) == each))
    return sorted(found, key=lambda one: (not one.whole, history.key(one.value), one.trial.config))


def reruns(history: History, seed: int = 0) -> list[Rerun]:
    """The configurations that ran again with fresh seeds, best fresh mean first."""
    fresh = _fresh(history)
    found = [_rerun(one, fresh[one.trial.config]) for one in configurations(history) if one.trial.config in fresh]
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
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0  # Blom


def recommended(history: History, seed: int = 0) -> Recommendation | None:
    """The best configuration by fresh mean where fresh seeds ran, else by its value in the search."""
    vouched = reruns(history, seed)
    if vouched:
        return Recommendation(vouched[0].trial, vouched[0].mean, vouched[0])
    best = configurations(history)[:1]
    return Recommendation(best[0].trial, best[0].value, None) if best else None


def _fresh(history: History) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for trial in history.trials.values():
        if trial.fresh and trial.status == "done" and trial.metric is not None:
            found.setdefault(trial.config, []).append(trial.metric)
    return found


def _rerun(one: Configuration, values: Sequence[float]) -> Rerun:
    mean, half = float(np.mean(values)), math.nan
    if len(values) > 1:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1)) * _error(values)
    return Rerun(one.trial, one.value, tuple(values), mean, mean - half, mean + half)


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

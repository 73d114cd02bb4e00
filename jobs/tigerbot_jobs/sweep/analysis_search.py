"""How a search went against what it cost, beside two searches that need no cleverness.

Random search: values are drawn again and again from a pool of trials whose parameters were drawn at random, each at
the cost of a whole trial, and the best so far of every draw gives a band. i-Epoch (arXiv 2404.04111): train every
configuration for i steps, keep the best, train it to the end. A searcher or scheduler that is not below both was not
worth having. Resampling is seeded: the same journal gives the same band.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tigerbot_jobs.sweep.analysis import Exploit, History, Rung, Trial

_AT_RANDOM = ("random", "quasi", "grid")
_RESAMPLES, _GRID, _EPOCHS = 400, 120, 10


@dataclass(frozen=True)
class BestSoFar:
    """Cost spent when each new best trial ended, and its value."""

    costs: tuple[float, ...]
    values: tuple[float, ...]
    names: tuple[str, ...]
    total: float


@dataclass(frozen=True)
class Band:
    """Best of random search at some costs: median, and the 5th and 95th percentile of the resamples.

    Attributes:
        pool: how many trials the values are drawn from. `startup`: they are a searcher's random first ones.
    """

    costs: np.ndarray
    low: np.ndarray
    median: np.ndarray
    high: np.ndarray
    pool: int
    startup: bool


@dataclass(frozen=True)
class RungSummary:
    """One rung, by its step: who reached it, who was let on, how well its order foretold the end's (Spearman)."""

    step: int
    values: tuple[Rung, ...]
    promoted: int
    correlation: float | None


@dataclass(frozen=True)
class Stretch:
    """A part of a population's winning line: the member that held the weights, between two steps."""

    name: str
    start: int
    end: int
    exploit: Exploit | None


def counts_cards(history: History) -> bool:
    """Whether cost is in card-hours; trials that hold no card cost their own hours."""
    return any(trial.cards > 0 for trial in history.trials.values())


def cost(trial: Trial, cards: bool) -> float:
    return trial.card_hours if cards else trial.seconds / 3600


def best_so_far(history: History) -> BestSoFar:
    """The best value against what had been spent, failed trials and all, as trials ended; of a population, as it trained."""
    if history.exploits:
        return _best_of_population(history)
    cards, spent = counts_cards(history), 0.0
    costs, values, names = [], [], []
    for trial in sorted((t for t in history.trials.values() if t.endings), key=lambda t: t.ended_at):
        spent += cost(trial, cards)
        value = None if trial.fresh else trial.metric
        if value is not None and (not values or history.better(value, values[-1])):
            costs.append(spent)
            values.append(value)
            names.append(trial.name)
    return BestSoFar(tuple(costs), tuple(values), tuple(names), spent)


def random_band(history: History, seed: int = 0) -> Band | None:
    """The band of random search up to the cost of this search.

    None with fewer than 4 trials to draw from, and for a population, whose members' values are nobody's random draw.
    """
    trials, searcher = history.searched, history.lives[-1].searcher if history.lives else ""
    if history.exploits:
        return None
    startup = searcher not in _AT_RANDOM
    if startup:
        first = sorted(trials, key=lambda trial: trial.begun[0])
        trials = first[: min(10, max(4, history.planned // 3))]
    if len(trials) < 4:
        return None
    values = np.array([history.key(trial.metric) for trial in trials])
    each, total = _whole_cost(history), best_so_far(history).total
    # The best of more draws than there are values is the best value: a band would say what nobody has seen.
    count = min(len(values), max(2, math.ceil(total / each))) if each > 0 else len(values)
    at = np.unique(np.geomspace(1, count, _GRID).astype(int)) - 1
    rng = np.random.default_rng(seed)
    best = np.array([np.minimum.accumulate(values[rng.integers(0, len(values), count)])[at] for _ in range(_RESAMPLES)])
    low, median, high = np.percentile(best, [5, 50, 95], axis=0) * (1 if history.mode == "min" else -1)
    if history.mode == "max":
        low, high = high, low
    return Band((at + 1) * each, low, median, high, len(trials), startup)


def i_epoch(history: History) -> list[tuple[float, float, int]]:
    """(cost, value, i) of i-Epoch over the configurations of this search, where the winner at i ran to its end."""
    curves, cards = history.curves, counts_cards(history)
    trials = [trial for trial in history.searched if trial.name in curves] if not history.exploits else []
    if not trials:
        return []
    last = {trial.name: int(curves[trial.name].steps[-1]) for trial in trials}
    longest = max(last.values())
    steps = sorted({int(step) for step in np.geomspace(max(1, longest / 50), longest, _EPOCHS)})
    found = []
    for until in steps:
        reached = [trial for trial in trials if last[trial.name] >= until]
        winner = min(reached, key=lambda trial: history.key(_value_at(history, trial, until)))
        if winner.status != "done" or winner.metric is None:
            continue
        share = sum(cost(trial, cards) * until / max(1, last[trial.name]) for trial in trials)
        rest = cost(winner, cards) * (1 - until / max(1, last[winner.name]))
        found.append((share + rest, winner.metric, until))
    return found


def rung_summaries(history: History) -> list[RungSummary]:
    by_step: dict[int, list[Rung]] = {}
    for rung in history.rungs:
        if math.isfinite(rung.value):
            by_step.setdefault(rung.step, []).append(rung)
    summaries = []
    for step, values in sorted(by_step.items()):
        pairs = [(r.value, history.trials[r.name].metric) for r in values if _ended_whole(history, r.name)]
        promoted = sum(rung.promoted for rung in values)
        summaries.append(RungSummary(step, tuple(values), promoted, _spearman(pairs)))
    return summaries


def winning_line(history: History, winner: str) -> list[Stretch]:
    """Who held the winner's weights from the first step on: members of a population, the winner last."""
    end = int(history.curves[winner].steps[-1]) if winner in history.curves else 0
    end = max([end, *(exploit.step for exploit in history.exploits)])
    line, name = [], winner
    while True:
        taken = [e for e in history.exploits if e.name == name and e.step < end and e.source != name]
        if not taken:
            return [Stretch(name, 0, end, None), *reversed(line)]
        last = max(taken, key=lambda exploit: exploit.step)
        line.append(Stretch(name, last.step, end, last))
        name, end = last.source, last.step


def _best_of_population(history: History) -> BestSoFar:
    """Members end all at once: what they had on the way counts, at what all of them had cost by then."""
    members = [trial for trial in history.trials.values() if trial.name in history.curves]
    points = sorted(
        (float(t), float(value), trial.name)
        for trial in members
        for t, value in zip(history.curves[trial.name].times, history.curves[trial.name].values, strict=True)
    )
    began = np.array([trial.begun[0] for trial in members])
    ended = np.array([trial.ended_at if not trial.running else np.inf for trial in members])
    each = np.array([trial.cards if counts_cards(history) else 1.0 for trial in members]) / 3600

    def spent(t: float) -> float:
        return float(np.sum(np.clip(np.minimum(t, ended) - began, 0, None) * each))

    costs, values, names = [], [], []
    for t, value, name in points:
        if not values or history.better(value, values[-1]):
            costs.append(spent(t))
            values.append(value)
            names.append(name)
    return BestSoFar(tuple(costs), tuple(values), tuple(names), spent(points[-1][0]) if points else 0.0)


def _whole_cost(history: History) -> float:
    """What a trial costs that nobody stops: the mean of those that ran to their end."""
    cards = counts_cards(history)
    whole = [cost(trial, cards) for trial in history.searched if trial.status == "done"]
    costs = whole or [cost(trial, cards) for trial in history.searched]
    return float(np.mean(costs))


def _value_at(history: History, trial: Trial, step: int) -> float | None:
    curve = history.curves[trial.name]
    at = int(np.searchsorted(curve.steps, step, side="right")) - 1
    return float(curve.values[at]) if at >= 0 else None


def _ended_whole(history: History, name: str) -> bool:
    trial = history.trials.get(name)
    return trial is not None and trial.status == "done" and trial.metric is not None


def _spearman(pairs: Sequence[tuple[float, float | None]]) -> float | None:
    if len(pairs) < 5:
        return None
    from scipy.stats import rankdata

    here, end = (rankdata(column) for column in zip(*pairs, strict=True))
    found = float(np.corrcoef(here, end)[0, 1]) if here.std() and end.std() else math.nan
    return found if math.isfinite(found) else None

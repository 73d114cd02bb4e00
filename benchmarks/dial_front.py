"""Accuracy and diversity of a rule at its settings: the front they make, its hypervolume, and paired intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.dial_rules import Contender
from tigerbot_jobs.data import creative
from tigerbot_jobs.data.world import Question
from tigerbot_jobs.evaluate.job import CreativePrompt
from tigerbot_jobs.evaluate.measure import distinct_valid
from tigerbot_serve.ensemble.offline import Pair

DRAWS = 2000


@dataclass(frozen=True)
class Front:
    """What a contender reached: `accuracy` (points, questions) over seeds, `diversity` (points, prompts)."""

    name: str
    settings: tuple[float, ...]
    accuracy: np.ndarray
    diversity: np.ndarray
    single: bool

    @property
    def points(self) -> list[tuple[float, float, float]]:
        """(setting, accuracy, diversity)."""
        pairs = zip(self.settings, self.accuracy.mean(axis=1), self.diversity.mean(axis=1), strict=True)
        return [(float(setting), float(right), float(new)) for setting, right, new in pairs]

    def volume(self, questions: np.ndarray | None = None, prompts: np.ndarray | None = None) -> float:
        """Hypervolume over (0, 0), of all items or of picked ones."""
        right = self.accuracy if questions is None else self.accuracy[:, questions]
        new = self.diversity if prompts is None else self.diversity[:, prompts]
        return hypervolume(list(zip(new.mean(axis=1).tolist(), right.mean(axis=1).tolist(), strict=True)))


@dataclass(frozen=True)
class Span:
    """A number with its 95% paired-bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def measured(
    contender: Contender,
    pair: Pair,
    questions: Sequence[Question],
    prompts: Sequence[CreativePrompt],
    *,
    seeds: Sequence[int],
    samples: int,
) -> Front:
    """Ask everything at every setting. All contenders are asked the same with the same seeds."""
    accuracy, diversity = [], []
    for setting in contender.settings:
        right = np.zeros(len(questions))
        for seed in seeds:
            said = pair.answers([q.question for q in questions], contender.rule, setting, seed, 16)
            right += [q.fact_check(text) for q, text in zip(questions, said, strict=True)]
        repeated = [prompt.text for prompt in prompts for _ in range(samples)]
        wrote = pair.answers(repeated, contender.rule, setting, seeds[0], 64)
        accuracy.append(right / len(seeds))
        diversity.append([_novelty(p, wrote[i * samples : (i + 1) * samples]) for i, p in enumerate(prompts)])
    return Front(contender.name, tuple(contender.settings), np.array(accuracy), np.array(diversity), contender.single)


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Area under the staircase of the points that no other one beats in both."""
    area = reached = 0.0
    for x, y in sorted(points, reverse=True):
        if y > reached:
            area += x * (y - reached)
            reached = y
    return area


def compared(ours: Front, other: Front) -> Span:
    """Ours over the other's hypervolume, both on the same questions and prompts in every draw."""
    return _bootstrap(ours, lambda q, p: ours.volume(q, p) / max(other.volume(q, p), 1e-9))


def correlation(front: Front, what: str) -> Span:
    """Spearman's rank correlation of the setting with accuracy or diversity over the points."""
    array = front.accuracy if what == "accuracy" else front.diversity

    def of(questions: np.ndarray | slice, prompts: np.ndarray | slice) -> float:
        return _spearman(front.settings, array[:, questions if what == "accuracy" else prompts].mean(axis=1))

    return _bootstrap(front, of)


def _bootstrap(front: Front, of: Callable[..., float]) -> Span:
    rng = np.random.default_rng(1)
    questions, prompts = front.accuracy.shape[1], front.diversity.shape[1]
    draws = [of(rng.integers(0, questions, questions), rng.integers(0, prompts, prompts)) for _ in range(DRAWS)]
    low, high = np.quantile(draws, (0.025, 0.975))
    return Span(of(np.arange(questions), np.arange(prompts)), float(low), float(high))


def _spearman(a: Sequence[float], b: np.ndarray) -> float:
    ranks = [_ranks(np.asarray(values, dtype=float)) for values in (a, b)]
    if min(rank.std() for rank in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks with ties shared."""
    return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])


def _novelty(prompt: CreativePrompt, texts: Sequence[str]) -> float:
    return distinct_valid(texts, [creative.valid(prompt.kind, prompt.lang, text) for text in texts])

"""Which configurations are best: by the mean over their seeds, by fresh seeds, or as a Pareto front."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tigerbot.spec import SweepSpec
from tigerbot_jobs.sweep.trials import Trial


def modes_of(spec: SweepSpec) -> dict[str, str]:
    """Every objective, the sweep's metric first, with its mode."""
    return {spec.metric: spec.mode, **spec.objectives}


def loss(value: float, mode: str) -> float:
    """A metric turned so that lower is better."""
    return value if mode == "min" else -value


def ranked(trials: Iterable[Trial], spec: SweepSpec) -> list[list[Trial]]:
    """Trials by configuration, best mean first: those with all seeds run to the end, then the others."""
    configs: dict[int, list[Trial]] = {}
    for trial in trials:
        if not trial.fresh and trial.metric is not None and trial.status in ("done", "stopped"):
            configs.setdefault(trial.config, []).append(trial)

    def place(trials: list[Trial]) -> tuple[bool, float, int]:
        whole = sum(trial.status == "done" for trial in trials) == spec.seeds
        return not whole, loss(mean(trials), spec.mode), trials[0].config

    return sorted(configs.values(), key=place)


def mean(trials: Sequence[Trial]) -> float:
    """Of the metric."""
    return sum(trial.metric or 0.0 for trial in trials) / len(trials)


def confirmed(trials: Iterable[Trial], spec: SweepSpec) -> list[list[Trial]]:
    """The fresh trials of every configuration that was run again, best mean first."""
    configs: dict[int, list[Trial]] = {}
    for trial in trials:
        if trial.fresh and trial.status == "done" and trial.metric is not None:
            configs.setdefault(trial.config, []).append(trial)
    return sorted(configs.values(), key=lambda trials: (loss(mean(trials), spec.mode), trials[0].config))


def front(trials: Iterable[Trial], spec: SweepSpec) -> Iterator[Trial]:
    """The finished trials that no other is better than in every objective."""
    modes = modes_of(spec)
    done = [t for t in trials if t.status == "done" and all(t.metrics.get(name) is not None for name in modes)]
    points = {t.name: [loss(t.metrics[name], mode) for name, mode in modes.items()] for t in done}
    for trial in done:
        if not any(_dominates(other, points[trial.name]) for other in points.values()):
            yield trial


def _dominates(a: list[float], b: list[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

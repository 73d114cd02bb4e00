"""What a sweep cost, by how its trials ended, and what broke, by cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tigerbot_jobs.sweep.analysis import History, Trial
from tigerbot_jobs.sweep.analysis_search import best_so_far, counts_cards

_CLOSE = 0.01


@dataclass(frozen=True)
class Spent:
    """Trials of one fate and what they took.

    `retried` are attempts that failed and were begun again, `cut short` those whose driver died under them, `taken over`
    the stretches of a population's members before they went on with another's weights.
    """

    what: str
    trials: int
    hours: float
    card_hours: float


@dataclass(frozen=True)
class Failure:
    """Attempts that failed for one cause: of how many trials, how many of those went well later, and at what cost."""

    cause: str
    attempts: int
    trials: int
    recovered: int
    card_hours: float
    error: str
    example: str


def spent(history: History) -> list[Spent]:
    """Everything the sweep took, without empty rows; what died is counted up to its last point."""
    rows: dict[str, list[tuple[str, float, float]]] = {}
    for trial in history.trials.values():
        for ending in trial.endings:
            what = "fresh seeds" if trial.fresh and ending.status == "done" else ending.status
            rows.setdefault(what, []).append((trial.name, ending.seconds, trial.cards))
        for index, seconds in _open_ended(history, trial):
            rows.setdefault(_fate(trial, index), []).append((trial.name, seconds, trial.cards))
    order = ("done", "taken over", "stopped", "fresh seeds", "failed", "killed", "retried", "cut short", "running")
    return [
        Spent(
            what,
            len({name for name, _, _ in rows[what]}),
            sum(seconds for _, seconds, _ in rows[what]) / 3600,
            sum(seconds * cards for _, seconds, cards in rows[what]) / 3600,
        )
        for what in sorted(rows, key=lambda what: (order.index(what) if what in order else len(order), what))
    ]


def money(history: History, card_hours: float) -> float | None:
    return None if history.price is None else history.price * card_hours


def cost_to_close(history: History) -> tuple[float, float] | None:
    """(cost when the best was within 1% of the final best, cost of the whole search), in the unit of `counts_cards`."""
    found = best_so_far(history)
    if not found.values:
        return None
    near = abs(found.values[-1]) * _CLOSE
    first = next(c for c, value in zip(found.costs, found.values, strict=True) if abs(value - found.values[-1]) <= near)
    return first, found.total


def failures(history: History) -> list[Failure]:
    """Failed attempts by cause, the most frequent first."""
    grouped: dict[str, list[tuple[Trial, float, str]]] = {}
    for trial in history.trials.values():
        for ending in trial.endings:
            if ending.broken:
                hit = trial, ending.seconds, ending.error
                grouped.setdefault(ending.cause or "unknown", []).append(hit)
        for index, seconds in _open_ended(history, trial):
            if _fate(trial, index) == "retried":
                grouped.setdefault(trial.reasons[index + 1], []).append((trial, seconds, ""))
    found = [_failure(cause, hits) for cause, hits in grouped.items()]
    return sorted(found, key=lambda failure: (-failure.attempts, failure.cause))


def hours_unit(history: History) -> str:
    return "card-hours" if counts_cards(history) else "trial-hours"


def wall_s(history: History) -> float:
    """From the first driver's opening to the last thing that ended or began."""
    times = [t for trial in history.trials.values() for t in (*trial.begun, *(e.t for e in trial.endings))]
    return max(times, default=0.0) - min((life.t for life in history.lives), default=min(times, default=0.0))


def nodes(history: History) -> Mapping[str, int]:
    """Trials by the node they ran on last."""
    counted: dict[str, int] = {}
    for trial in history.trials.values():
        counted[trial.node] = counted.get(trial.node, 0) + 1
    return counted


def _failure(cause: str, hits: list[tuple[Trial, float, str]]) -> Failure:
    trials = {trial.name: trial for trial, _, _ in hits}
    example, _, error = next((hit for hit in hits if hit[2]), hits[0])
    return Failure(
        cause=cause,
        attempts=len(hits),
        trials=len(trials),
        recovered=sum(trial.status in ("done", "stopped") for trial in trials.values()),
        card_hours=sum(seconds * trial.cards for trial, seconds, _ in hits) / 3600,
        error=error,
        example=example.name,
    )


def _fate(trial: Trial, index: int) -> str:
    """What became of an attempt that did not say how it ended: the next one's reason tells."""
    if index + 1 == len(trial.begun):
        return "running" if trial.running else "cut short"
    reason = trial.reasons[index + 1]
    return {"": "cut short", "takeover": "taken over"}.get(reason, "retried")


def _open_ended(history: History, trial: Trial) -> list[tuple[int, float]]:
    """(attempt, seconds up to its last point) of attempts that did not say how they ended."""
    if len(trial.begun) == len(trial.endings) and not trial.running:
        return []
    curve, found = history.curves.get(trial.name), []
    for index, began in enumerate(trial.begun):
        until = trial.begun[index + 1] if index + 1 < len(trial.begun) else float("inf")
        if any(began <= ending.t <= until for ending in trial.endings):
            continue
        seen = curve.times[(curve.times >= began) & (curve.times < until)] if curve is not None else ()
        found.append((index, float(max(seen)) - began if len(seen) else 0.0))
    return found

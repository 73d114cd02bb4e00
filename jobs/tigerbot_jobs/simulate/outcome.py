"""What a simulation says: goodput with its confidence interval, where the time went, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tigerbot_jobs.simulate.engine import Engine
from tigerbot_jobs.simulate.mixes import KINDS
from tigerbot_jobs.simulate.phases import Raw
from tigerbot_jobs.simulate.setting import Setting

_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean over replicas with its 95% confidence interval, and where 90% of single runs lie."""

    mean: float
    low: float
    high: float
    run_low: float
    run_high: float


@dataclass(frozen=True)
class Outcome:
    """One policy in one situation.

    Attributes:
        goodput: useful work over what the full job could have done in the wall time: fewer nodes and stragglers count.
        step_time: share of the wall time in steps of the final history, at whatever speed.
        shares: mean share of the wall time by ledger category; they sum to 1.
        failures, waits: a run's mean number of failures, and of times it had to wait for a node.
    """

    name: str
    goodput: Estimate
    step_time: Estimate
    shares: dict[str, float]
    failures: float
    failures_by_kind: dict[str, float]
    waits: float
    mtbf_h: float
    memory_every_s: float | None
    storage_every_s: float
    nodes_bought: int
    replicas: int
    events: int


@dataclass(frozen=True)
class Money:
    """All cards bought, for the whole time; `per_useful` is per card-hour of work that counts."""

    total: float
    lost: float
    per_useful: float


def simulate(setting: Setting, *, replicas: int, seed: int) -> Outcome:
    """Run the replicas and sum up. Same seed and replicas, same outcome."""
    raw = Engine(setting, replicas, seed).run()
    return Outcome(
        name=setting.name,
        goodput=estimate(raw.work_s / setting.horizon_s),
        step_time=estimate(raw.seconds["step"] / setting.horizon_s),
        shares={name: float(seconds.mean() / setting.horizon_s) for name, seconds in raw.seconds.items()},
        failures=float(raw.failures.mean()),
        failures_by_kind=_by_kind(raw),
        waits=float(raw.waits.mean()),
        mtbf_h=setting.mtbf_s / 3600,
        memory_every_s=setting.tiers.memory_every_s if setting.tiers.memory else None,
        storage_every_s=setting.tiers.storage_every_s,
        nodes_bought=setting.nodes + setting.spares,
        replicas=replicas,
        events=raw.events,
    )


def estimate(values: np.ndarray) -> Estimate:
    """Mean, 95% interval of the mean, 5th and 95th percentile."""
    mean = float(values.mean())
    margin = _NORMAL_95 * float(values.std(ddof=1)) / len(values) ** 0.5
    low, high = np.quantile(values, (0.05, 0.95))
    return Estimate(mean, mean - margin, mean + margin, float(low), float(high))


def money(outcome: Outcome, setting: Setting, *, cards_per_node: int, price_per_card_hour: float) -> Money:
    """What the cards cost, spares and standbys included, and what of it was no useful work."""
    hours = setting.horizon_s / 3600
    total = outcome.nodes_bought * cards_per_node * hours * price_per_card_hour
    useful_hours = setting.nodes * cards_per_node * hours * outcome.goodput.mean
    return Money(total, total - useful_hours * price_per_card_hour, total / useful_hours if useful_hours else np.inf)


def _by_kind(raw: Raw) -> dict[str, float]:
    replicas = len(raw.work_s)
    return {kind: float(count / replicas) for kind, count in zip(KINDS, raw.by_kind, strict=True)}

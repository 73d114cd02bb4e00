"""One trial of a sweep, as far as its journal tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["waiting", "running", "done", "stopped", "failed", "killed"]
UNFINISHED = "budget"  # the cause of an end that a wider budget takes back


@dataclass(slots=True)
class Trial:
    """`index` is its number, `config` that of its configuration: the same for all its seeds.

    Attributes:
        seed: which of its configuration's seeds, from 0.
        fresh: it confirms a configuration; nobody stops it, and no searcher hears of it.
        step, metric, metrics: of its last point; step is -1 before the first.
        stop: the scheduler has stopped it; its process may not know yet.
        parent: whose state it goes on from when it begins again, in a population.
        after: why it is to begin again.
        changes: fields changed for a retry, e.g. half the micro batch.
        retried: how often it began again, by cause.
        seconds: of every attempt, as far as is known.
    """

    index: int
    name: str
    config: int
    seed: int
    params: dict[str, Any]
    fresh: bool = False
    status: Status = "waiting"
    attempt: int = 0
    step: int = -1
    metric: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    cause: str = ""
    stop: bool = False
    parent: str | None = None
    after: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    retried: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    began: float = 0.0
    said: float = 0.0

    @property
    def over(self) -> bool:
        return self.status not in ("waiting", "running") and self.cause != UNFINISHED

    def as_result(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "params": self.params,
            "config": config_name(self.config),
            "seed": self.seed,
            "fresh": self.fresh,
            "status": self.status,
            "metric": self.metric,
            "error": self.error,
            "cause": self.cause,
        }


def trial_name(index: int) -> str:
    return f"trial-{index:04d}"


def config_name(config: int) -> str:
    return f"c{config:04d}"


def index_of(name: str) -> int:
    return int(name.rpartition("-")[2])


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of a report is a number; a scalar of numpy or torch is one too."""
    values = {k: v.item() if getattr(v, "ndim", None) == 0 else v for k, v in metrics.items()}
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}

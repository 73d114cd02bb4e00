"""`kind: sweep`: trials over a space, what may be spent, when trials are compared."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tigerbot.spec.parts import Count, Job, Part, Real


class Budget(Part):
    """What a sweep may spend, beside its trials: it ends with what is first used up. Money is card-hours at a price."""

    hours: Annotated[Real, Field(gt=0)] | None = None
    card_hours: Annotated[Real, Field(gt=0)] | None = None
    money: Annotated[Real, Field(gt=0)] | None = None
    price_per_card_hour: Annotated[Real, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _priced(self) -> Budget:
        if self.money is not None and not self.price_per_card_hour:
            raise ValueError("money wants price_per_card_hour; got none")
        return self


class Scheduling(Part):
    """When trials are compared, in their own steps.

    asha, hyperband: rungs at `grace * reduction^k`, where the best 1/reduction go on; median: from `grace` on; pbt:
    every `interval` steps, the worst `quantile` takes over from the best.
    """

    grace: Count = 1
    reduction: Annotated[Count, Field(ge=2)] = 3
    brackets: Annotated[Count, Field(le=8)] = 3
    interval: Count = 5
    quantile: Annotated[Real, Field(gt=0, le=0.5)] = 0.25


class Confirm(Part):
    """The best `top` configurations are run again with so many fresh seeds, to the end: what won by luck shows."""

    top: Annotated[Count, Field(le=100)] = 5
    seeds: Count = 3


class Transfer(Part):
    """A learning rate that was best for a model of another width."""

    width: Count
    lr: Annotated[Real, Field(gt=0)]


class SweepSpec(Job):
    """Trials over a space. `target` is a train spec file or `module:function`.

    A light trial runs inside a process that is used again; a heavy one is a fault-tolerant training run with workers of
    its own. `objectives` are further metrics to be good at; `seeds` how many trials each configuration gets.
    """

    kind: Literal["sweep"]
    target: str
    trial: Literal["light", "heavy"] = "light"
    space: dict[str, dict[str, Any]]
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    objectives: dict[str, Literal["min", "max"]] = {}
    trials: Count = 12
    seeds: Count = 1
    confirm: Confirm | None = None
    budget: Budget = Budget()
    max_concurrent: Count = 2
    cpus_per_trial: Annotated[Real, Field(gt=0)] = 1.0
    gpus_per_trial: Annotated[Real, Field(ge=0)] = 0.0
    searcher: Literal["random", "grid", "quasi", "tpe"] = "tpe"
    scheduler: Literal["none", "asha", "hyperband", "median", "pbt"] = "asha"
    scheduling: Scheduling = Scheduling()
    deadline_s: Annotated[Real, Field(gt=0)] | None = None
    same_failures: Count = 5
    warm_start: dict[str, str] = {}
    transfer_from: Transfer | None = None
    params: dict[str, Any] = {}
    seed: int = 1

    @model_validator(mode="after")
    def _fits(self) -> SweepSpec:
        if self.objectives and self.scheduler != "none":
            raise ValueError(f"objectives wants scheduler none: nothing can be ranked on the way; got {self.scheduler}")
        if self.metric in self.objectives:
            raise ValueError(f"objectives wants metrics beside {self.metric}; got it again")
        if self.warm_start and self.searcher != "tpe":
            raise ValueError(f"warm_start wants a searcher that learns (tpe); got {self.searcher}")
        return self

"""How an endpoint grows and shrinks: its replicas, and what the autoscaler listens to."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from tigerbot.spec.parts import Count, Part, Real

Seconds = Annotated[Real, Field(gt=0)]
Wait = Annotated[Real, Field(ge=0)]


class Autoscale(Part):
    """When replicas come and go between the two bounds. A replica's load is the tokens it still has to decode.

    Every replica tells it each `metrics_interval_s`; what is wanted counts when it lasted for a delay.
    """

    metrics_interval_s: Seconds = 1.0
    look_back_s: Seconds = 6.0
    upscale_delay_s: Wait = 2.0
    downscale_delay_s: Wait = 60.0
    downscale_to_zero_delay_s: Wait = 600.0

    @model_validator(mode="after")
    def _a_window_of_samples(self) -> Autoscale:
        if self.look_back_s <= self.metrics_interval_s:
            raise ValueError(f"look_back_s wants more than metrics_interval_s, {self.metrics_interval_s:g}")
        return self


class ServeScale(Part):
    """`replicas: 2`, or `replicas: [1, 4]` to follow the load; `[0, 4]` has none while nobody asks."""

    replicas: Count | tuple[Annotated[int, Field(ge=0)], Count] = 1
    cpus_per_replica: Annotated[Real, Field(gt=0)] = 1.0
    gpus_per_replica: Annotated[Real, Field(ge=0)] = 0.0
    threads: Count | None = None
    replicas_per_node: Count | None = None  # at most; as many as fit, where it is left out
    target_tokens_per_replica: Count = 2048
    autoscale: Autoscale = Autoscale()
    start_timeout_s: Seconds = 300.0

    @property
    def bounds(self) -> tuple[int, int]:
        """Fewest and most replicas."""
        return self.replicas if isinstance(self.replicas, tuple) else (self.replicas, self.replicas)

    @property
    def follows_load(self) -> bool:
        return isinstance(self.replicas, tuple)

    @model_validator(mode="after")
    def _a_range(self) -> ServeScale:
        low, high = self.bounds
        if low > high:
            raise ValueError(f"replicas: [{low}, {high}] wants the smaller number first")
        return self

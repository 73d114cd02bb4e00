"""A spec's `scale` as Ray Serve's options."""

from __future__ import annotations

import warnings
from typing import Any

from tigerbot.spec.scale import ServeScale


def autoscaling(scale: ServeScale) -> dict[str, Any]:
    """`num_replicas`, or an autoscaling configuration with our policy."""
    low, high = scale.bounds
    if not scale.follows_load:
        return {"num_replicas": high}
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    given = scale.autoscale
    with warnings.catch_warnings():
        # Serve calls `metrics_interval_s` deprecated, but the variables that it names instead are read by nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        return {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=low,
                initial_replicas=max(low, 1),  # a model that does not load is found out at once
                max_replicas=high,
                metrics_interval_s=given.metrics_interval_s,
                look_back_period_s=given.look_back_s,
                upscale_delay_s=given.upscale_delay_s,
                downscale_delay_s=given.downscale_delay_s,
                downscale_to_zero_delay_s=given.downscale_to_zero_delay_s,
                policy=AutoscalingPolicy(
                    policy_function="tigerbot_serve.scale.policy:OutstandingTokens",
                    policy_kwargs={"target_tokens": scale.target_tokens_per_replica},
                ),
            )
        }

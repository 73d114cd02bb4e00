"""The number of replicas that outstanding tokens call for, and the options that Serve is given."""

from __future__ import annotations

import pickle
import time
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from tigerbot.errors import SpecError
from tigerbot.spec import ServeSpec, parse_spec
from tigerbot_serve.scale.autoscaling import autoscaling
from tigerbot_serve.scale.policy import OutstandingTokens


def context(*replicas: list[float], mean: float | None = None, requests: float = 0.0) -> Any:
    """What Serve's controller gives a policy: samples of each replica, newest last."""
    series = {str(i): [SimpleNamespace(value=value) for value in samples] for i, samples in enumerate(replicas)}
    means = {str(i): sum(samples) / len(samples) for i, samples in enumerate(replicas)}
    if mean is not None:
        means = {"0": mean}
    return SimpleNamespace(
        raw_metrics={"outstanding_tokens": series, "running": {"0": [SimpleNamespace(value=99)]}},
        aggregated_metrics={"outstanding_tokens": means},
        total_num_requests=requests,
    )


def serve_spec(scale: dict[str, Any]) -> ServeSpec:
    spec = parse_spec({"kind": "serve", "name": "s", "members": {"creative": "x"}, "scale": scale})
    assert isinstance(spec, ServeSpec)
    return spec


def wanted(ctx: Any, target: int = 1000) -> int:
    return OutstandingTokens(target)(ctx)[0]


def test_a_replica_is_wanted_for_every_target_of_outstanding_tokens() -> None:
    assert wanted(context([0.0, 900.0], [100.0])) == 1
    assert wanted(context([0.0, 1001.0])) == 2
    assert wanted(context([4000.0], [4000.0])) == 8


def test_it_goes_up_with_the_newest_number_and_down_with_the_mean() -> None:
    assert wanted(context([0.0, 0.0, 0.0, 4000.0])) == 4
    assert wanted(context([0.0], mean=3000.0)) == 3


def test_none_is_wanted_while_nobody_asks_and_one_as_soon_as_somebody_does() -> None:
    assert wanted(context([0.0])) == 0
    assert wanted(context()) == 0
    assert wanted(context([0.0], requests=1.0)) == 1


def test_the_policy_crosses_to_the_controller_and_costs_it_nothing() -> None:
    options = autoscaling(serve_spec({"replicas": [1, 64], "target_tokens_per_replica": 500}).scale)
    config = options["autoscaling_config"]
    assert isinstance(config, AutoscalingConfig)
    policy = pickle.loads(pickle.dumps(config.policy)).get_policy()(**config.policy.policy_kwargs)
    busy = context(*([100.0] * 6 for _ in range(64)))

    began = time.process_time()
    for _ in range(200):
        assert policy(busy)[0] == 13

    assert (time.process_time() - began) / 200 < 0.001


def test_a_fixed_count_has_no_autoscaler() -> None:
    assert autoscaling(serve_spec({"replicas": 3}).scale) == {"num_replicas": 3}


def test_the_spec_reaches_serve_as_it_stands() -> None:
    config = autoscaling(serve_spec({"replicas": [0, 4], "autoscale": {"downscale_delay_s": 7}}).scale)[
        "autoscaling_config"
    ]

    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 1, 4)
    assert (config.metrics_interval_s, config.look_back_period_s) == (1.0, 6.0)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (2.0, 7.0)


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        ({"replicas": [4, 1]}, "smaller number first"),
        ({"replicas": 0}, "scale.replicas"),
        ({"autoscale": {"look_back_s": 1, "metrics_interval_s": 2}}, "look_back_s wants more"),
    ],
)
def test_a_scale_that_cannot_be_is_one_line(scale: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        serve_spec(scale)

"""One replica as Ray Serve sees it: gateway and engine in one process, its load, its health, how it leaves.

What a replica needs is built inside it, when Serve asks for its ASGI app: the class travels with a spec and digests.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tigerbot.spec import ServeSpec
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.scale.autoscaling import autoscaling

DEPLOYMENT = "ensemble"
MAX_ONGOING = 512  # Serve's own limit is the last fence; the engine's queue is the first
DRAIN_MARGIN_S = 40.0  # behind direct ingress Serve takes 35 s of the drain for itself
QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True)
class Version:
    """What is deployed: a resolved spec, the keys it lets in, the 12 digits that tell it from another, the run's folder."""

    spec: ServeSpec
    keys: KeyRing
    id: str
    folder: Path


def application_of(version: Version) -> Any:
    """The Serve application of a version."""
    from ray import serve

    spec = version.spec
    scale = spec.scale
    sized: dict[str, Any] = dict(autoscaling(scale))
    if scale.replicas_per_node:
        sized["max_replicas_per_node"] = scale.replicas_per_node
    deployment = serve.deployment(
        replica_class(version),
        name=DEPLOYMENT,
        **sized,
        ray_actor_options={"num_cpus": scale.cpus_per_replica, "num_gpus": scale.gpus_per_replica},
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=spec.http.request_timeout_s + DRAIN_MARGIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100 if scale.bounds[1] <= 2 else 25,
        max_constructor_retry_count=2,
    )
    # A random version, Serve's own choice, would restart every replica for a changed count, and again on the way back.
    return deployment.options(version=version.id, _internal=True).bind()


def replica_class(version: Version) -> Any:
    from ray import serve

    def build() -> Any:
        from tigerbot_serve.deploy.start import started_app

        return started_app(version)

    @serve.ingress(build)
    class Replica:
        app: Any

        def check_health(self) -> None:
            engine = self.app.state.engine
            if not engine.alive:
                raise RuntimeError("the engine's thread is dead")
            if engine.starved:
                raise RuntimeError("there is no memory left, not even for one request")

        async def record_autoscaling_stats(self) -> dict[str, float]:
            return {"outstanding_tokens": float(self.app.state.engine.stats().outstanding_tokens)}

        async def about(self) -> dict[str, Any]:
            return {"version": version.id}

        async def canary(self) -> dict[str, Any] | None:
            engine = self.app.state.engine
            return engine.report() if version.spec.canary is not None else None

        async def take_back_canary(self, why: str) -> None:
            self.app.state.engine.take_back(why)

    return Replica

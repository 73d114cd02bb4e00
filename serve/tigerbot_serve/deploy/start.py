"""What a replica does before it is healthy: load the models, start the engine, decode once."""

from __future__ import annotations

from typing import Any

from tigerbot.errors import ModelError
from tigerbot.spec import ServeSpec
from tigerbot_serve.deploy.edge import Answered
from tigerbot_serve.deploy.replica import Version
from tigerbot_serve.ensemble.build import build_engine
from tigerbot_serve.gateway.app import BUDGETS, create_app
from tigerbot_serve.gateway.bank_actor import shared_limiter
from tigerbot_serve.scale.canary import Caller, TwoEngines
from tigerbot_serve.scale.warm import warm


def started_app(version: Version) -> Any:
    """The ASGI application of a replica whose engine runs and is warm.

    Raises:
        ModelError: the models are not there, or do not belong together.
    """
    spec = version.spec
    engine: Any = _warm_engine(spec)
    if spec.canary is not None:
        canary = spec.canary
        other = _warm_engine(spec.model_copy(update={"members": canary.members, "heads": canary.heads}))
        if other.members.hashes["tokenizer_hash"] != engine.members.hashes["tokenizer_hash"]:
            raise ModelError("has another tokenizer", where="canary.members", fix="serve it under another name")
        engine = TwoEngines(engine, other, canary)
    most = spec.scale.bounds[1]
    limiter = shared_limiter(spec, version.folder / BUDGETS, replicas=most) if most > 1 else None
    app = create_app(engine, spec, version.keys, folder=version.folder, limiter=limiter)
    app.add_middleware(Answered)
    if spec.canary is not None:
        app.add_middleware(Caller)
    return app


def _warm_engine(spec: ServeSpec) -> Any:
    engine = _engine_of(spec)
    engine.start()
    warm(engine)
    return engine


def _engine_of(spec: ServeSpec) -> Any:
    if spec.engine.vllm is None:
        return build_engine(spec)
    from tigerbot_serve.adapters.vllm_engine import VllmEngine

    return VllmEngine(spec)

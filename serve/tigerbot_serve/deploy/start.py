"""What a replica does before it is healthy: load the models, start the engine, decode once."""

from __future__ import annotations

from typing import Any

from tigerbot_serve.deploy.edge import Answered
from tigerbot_serve.deploy.replica import Version
from tigerbot_serve.ensemble.build import build_engine
from tigerbot_serve.gateway.app import create_app
from tigerbot_serve.scale.warm import warm


def started_app(version: Version) -> Any:
    """The ASGI application of a replica whose engine runs and is warm."""
    engine = build_engine(version.spec)
    engine.start()
    warm(engine)
    app = create_app(engine, version.spec, version.keys)
    app.add_middleware(Answered)
    return app

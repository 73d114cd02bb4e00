"""`kind: serve` on Ray Serve: deploy an ensemble, update it in place, keep it up, take it down.

One deployment on the hot path: a replica holds the gateway and the engine in one process, since a second hop costs more
than the gateway does. An update starts the new replicas before it stops the old ones, and what does not start leaves
the old ones serving.

    keep.run        the job behind `tiger serve`: deploy, stay, take updates until it is stopped
    deploy          deploy without staying
    application     the same replica for a cluster's own `serve deploy` and KubeRay's RayService

Nothing is imported before it is asked for: Serve's proxies load `edge` from here, and are to be up in seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tigerbot_serve.deploy.endpoint import Endpoint, deploy
    from tigerbot_serve.deploy.keep import run
    from tigerbot_serve.deploy.service import application

__all__ = ["Endpoint", "application", "deploy", "run"]

_HOMES = {"Endpoint": "endpoint", "application": "service", "deploy": "endpoint", "run": "keep"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

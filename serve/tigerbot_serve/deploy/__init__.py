"""`kind: serve` on Ray Serve: deploy an ensemble, update it in place, keep it up, take it down.

One deployment on the hot path: a replica holds the gateway and the engine in one process, since a second hop costs more
than the gateway does. An update starts the new replicas before it stops the old ones, and what does not start leaves
the old ones serving.

    keep.run        the job behind `tiger serve`: deploy, stay, take updates until it is stopped
    deploy          deploy without staying
    application     the same replica for a cluster's own `serve deploy` and KubeRay's RayService
"""

from tigerbot_serve.deploy.endpoint import Endpoint, deploy
from tigerbot_serve.deploy.keep import run
from tigerbot_serve.deploy.service import application

__all__ = ["Endpoint", "application", "deploy", "run"]

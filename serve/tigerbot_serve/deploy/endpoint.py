"""A deployed ensemble: deploy it, update it, see whether it is still ours, take it down.

What is deployed under a name is remembered in the cluster itself, so that whoever updates it from another process can
go back to it, and whoever deployed it first knows that it is another's now.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tigerbot.cluster import Cluster, connect, ray_is_given
from tigerbot.errors import InputError
from tigerbot.spec import ServeSpec
from tigerbot_serve.adapters.vllm_checks import check_vllm
from tigerbot_serve.deploy.checks import check_door, check_members, check_update, resolved, version_of
from tigerbot_serve.deploy.ingress import applied, check_port, environment, start_proxy
from tigerbot_serve.deploy.replica import DEPLOYMENT, DRAIN_MARGIN_S, Version
from tigerbot_serve.deploy.rollout import replicas, roll_out
from tigerbot_serve.gateway.app import BUDGETS
from tigerbot_serve.gateway.bank_actor import start_bank, stop_bank
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.scale.aliases import with_folders

OWN_STOP_S = 10.0  # a Ray of our own ends with its endpoint: answers under way have this long


@dataclass(frozen=True)
class _Record:
    """What the cluster remembers of a name."""

    owner: str
    version: Version


@dataclass
class Endpoint:
    """A deployed ensemble."""

    url: str
    version: Version
    lacks: list[str]
    _cluster: Cluster
    _owner: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def replicas(self) -> int:
        return replicas(self.version.spec.name)

    @property
    def taken_over(self) -> bool:
        """Another process has deployed under this name since."""
        found = _recall(self.version.spec.name)
        return found is not None and found.owner != self._owner

    def ask_replicas(self, method: str, *args: Any) -> list[Any]:
        """What a method of every replica returns; nothing while one of them is leaving."""
        from ray import serve

        handle = serve.get_deployment_handle(DEPLOYMENT, self.version.spec.name)
        try:
            return handle.broadcast(method, *args).results(timeout_s=5.0)
        except Exception:  # whatever a replica that dies under the question raises
            return []

    def update(self, spec: ServeSpec) -> str:
        """Put another version in its place, in flight; returns a line that says what became of it.

        The same spec is another version where an alias it names, or a folder's content, has changed.

        Raises:
            InputError, ModelError: it cannot be served; what was there serves on.
            ServeError: it did not start; what was there serves on.
        """
        check_update(self.version.spec, spec)
        began = time.monotonic()
        version = version_to_serve(spec, self.version.keys, self.version.folder, self.version.spec.http.port)
        if version == self.version:
            return f"{spec.name}: nothing differs from what is served"
        same = version.id == self.version.id
        if self._cluster.local and not same:
            _check_room(version.spec)
        _share_limits(version)
        roll_out(version, self.version)
        self.version = version
        _remember(_Record(self._owner, version))
        took = f"{time.monotonic() - began:.1f} s"
        if same:
            return f"{spec.name}: scaled in {took}, {self.replicas} replicas"
        return f"{spec.name}: version {version.id} in {took}; replicas of the old one finish what they began"

    def stop(self) -> None:
        """Take it down, and with it the Ray that was started for it. Others on a shared cluster stay."""
        from ray import serve

        if not self.taken_over:
            name = self.version.spec.name
            serve.delete(name, _blocking=False)
            longest = self.version.spec.http.request_timeout_s + DRAIN_MARGIN_S
            until = time.monotonic() + (OWN_STOP_S if self._cluster.local else longest)
            while name in serve.status().applications and time.monotonic() < until:
                time.sleep(0.1)
            _forget(name)
            stop_bank(name)
        _leave(self._cluster)


def deploy(spec: ServeSpec, folder: Path) -> Endpoint:
    """Deploy an ensemble, or update the one of this name on the cluster, and return when it answers.

    Raises:
        ModelError: its members or heads are not there, or do not belong together.
        ServeError: an open host without keys, or a replica that does not start.
        InputError: the port is in use.
    """
    version = version_to_serve(spec, KeyRing.from_environment(spec.http.api_keys_env, spec.http.keys_file), folder)
    spec = version.spec
    if not ray_is_given():
        check_port(spec)
    with applied({} if ray_is_given() else environment(spec)):
        cluster = connect(None, num_cpus=_logical_cpus(spec))
        _quiet()
        try:
            lacks = start_proxy(spec, own_ray=cluster.local)
            before = _recall(spec.name)
            _share_limits(version)
            roll_out(version, before.version if before else None)
            endpoint = Endpoint(f"http://{_shown_host(spec)}:{spec.http.port}", version, lacks, cluster)
            _remember(_Record(endpoint._owner, version))
            return endpoint
        except BaseException:
            _leave(cluster)
            raise


def version_to_serve(spec: ServeSpec, keys: KeyRing, folder: Path, port: int = 0) -> Version:
    check_door(spec, keys)
    spec = with_folders(spec)
    check_vllm(spec)
    check_members(spec)
    spec = resolved(spec, port)
    return Version(spec, keys, version_of(spec, keys), folder.absolute())


def _leave(cluster: Cluster) -> None:
    """Serve's client would ask a controller that is gone, were there another deploy in this process."""
    from ray.serve.context import _set_global_client

    cluster.stop()
    if cluster.local:
        _set_global_client(None)


def _share_limits(version: Version) -> None:
    if version.spec.scale.bounds[1] > 1:
        start_bank(version.spec, version.folder / BUDGETS)


def _check_room(spec: ServeSpec) -> None:
    """New replicas stand beside the old ones, on a machine that will not grow.

    Raises:
        InputError: there is no room for one.
    """
    import ray

    free, scale = ray.available_resources(), spec.scale
    for resource, wanted in (("CPU", scale.cpus_per_replica), ("GPU", scale.gpus_per_replica)):
        if wanted > free.get(resource, 0.0):
            raise InputError(
                f"an update starts a new replica beside the old: {wanted:g} {resource} more, {free.get(resource, 0):g} free",
                where=f"scale.{resource.lower()}s_per_replica",
                fix=f"make it smaller, or tiger stop {spec.name} and serve it anew",
            )


def _quiet() -> None:
    import ray.serve  # noqa: F401 - it sets its logger's level when it is imported

    for name in ("ray.serve", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _logical_cpus(spec: ServeSpec) -> int:
    """Of a Ray of our own: what an update needs, whose new replicas stand beside the old ones."""
    scale = spec.scale
    return max(os.cpu_count() or 1, math.ceil(2 * scale.bounds[1] * scale.cpus_per_replica))


def _shown_host(spec: ServeSpec) -> str:
    return "127.0.0.1" if spec.http.host == "0.0.0.0" else spec.http.host


def _key(name: str) -> bytes:
    return f"tiger:serve:{name}".encode()


def _remember(record: _Record) -> None:
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_key(record.version.spec.name), pickle.dumps(record), overwrite=True)


def _recall(name: str) -> _Record | None:
    """What runs under a name, if it still does."""
    from ray import serve
    from ray.experimental.internal_kv import _internal_kv_get

    kept = _internal_kv_get(_key(name))
    return pickle.loads(kept) if kept is not None and name in serve.status().applications else None


def _forget(name: str) -> None:
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(_key(name))

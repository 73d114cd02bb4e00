"""The application for a cluster's own `serve deploy` and KubeRay's RayService: `tigerbot_serve.deploy:application`."""

from __future__ import annotations

from typing import Any

from tigerbot.errors import SpecError
from tigerbot.runs import local_root
from tigerbot.spec import ServeSpec, load_spec
from tigerbot_serve.deploy.endpoint import version_to_serve
from tigerbot_serve.deploy.replica import application_of
from tigerbot_serve.gateway.keys import KeyRing


def application(args: dict[str, Any]) -> Any:
    """The Serve application of the spec in `args: {spec: FILE}`; it is read where Serve builds, on the cluster.

    Raises:
        SpecError: it names no serve spec.
        ModelError: its members are not there.
        ServeError: an open host without keys.
    """
    path = args.get("spec")
    if not isinstance(path, str) or set(args) != {"spec"}:
        raise SpecError(f"args: got {args!r}, wants one field, spec", where="applications", fix="args: {spec: FILE}")
    spec = load_spec(path)
    if not isinstance(spec, ServeSpec):
        raise SpecError(f"kind: got {spec.kind}, wants serve", where=path, fix="name a serve spec")
    keys = KeyRing.from_environment(spec.http.api_keys_env, spec.http.keys_file)
    return application_of(version_to_serve(spec, keys, local_root(spec) / spec.name))

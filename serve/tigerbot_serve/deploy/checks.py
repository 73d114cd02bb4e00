"""What can be said of a serve spec before Ray is started, and the spec as a replica elsewhere reads it."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version as package_version
from pathlib import Path

from safetensors import SafetensorError, safe_open

from tigerbot.errors import InputError, ModelError, ServeError
from tigerbot.models import model_hash, tokenizer_hash
from tigerbot.ports import free_port
from tigerbot.spec import MembersSpec, ServeSpec
from tigerbot_serve.ensemble.heads import check_heads
from tigerbot_serve.ensemble.load import quantisation
from tigerbot_serve.gateway.app import LOOPBACK
from tigerbot_serve.gateway.keys import KeyRing
from tigerbot_serve.plugins.registry import resolved as resolved_plugins

ROLES = ("base", "creative", "factual")
# What changes without a new replica: how many there are, and where the process that keeps the endpoint writes.
_NOT_VERSION = {
    "name": True,
    "storage": True,
    "tracking": True,
    "scale": {"replicas", "target_tokens_per_replica", "autoscale", "start_timeout_s"},
}


def check_door(spec: ServeSpec, keys: KeyRing) -> None:
    """An open host wants keys.

    Raises:
        ServeError: it would answer everybody.
    """
    if spec.http.host not in LOOPBACK and not keys:
        raise ServeError(
            f"would answer everybody: no keys in {spec.http.api_keys_env}",
            where=f"http.host {spec.http.host}",
            fix=f"export {spec.http.api_keys_env}=key1,key2, set http.keys_file, or bind 127.0.0.1",
        )


def check_members(spec: ServeSpec) -> None:
    """The folders are there and hold models, and the heads are these models' own.

    Raises:
        ModelError: one is not.
    """
    for field, folder in _folders(spec).items():
        where = f"{field}: {folder}"
        if not Path(folder).is_dir():
            raise ModelError("there is no such folder", where=where, fix="give the path of a model folder")
        _check_weights(Path(folder), where)
    for heads, members in _pairs(spec):
        if heads is not None and members.factual is not None:
            check_heads(heads, _hashes(members))


def check_update(old: ServeSpec, new: ServeSpec) -> None:
    """A cluster's proxy stays where it is.

    Raises:
        InputError: the address differs.
    """
    for field in ("host", "port"):
        before, after = getattr(old.http, field), getattr(new.http, field)
        if before != after and not (field == "port" and after == 0):
            raise InputError(
                f"is {before} while {old.name} runs, got {after}",
                where=f"http.{field}",
                fix=f"set it back, or tiger stop {old.name} and serve it anew",
            )


def resolved(spec: ServeSpec, port: int = 0) -> ServeSpec:
    """Folders as a replica finds them, which runs elsewhere; a port where the spec leaves it open."""
    http = spec.http.model_copy(update={"port": spec.http.port or port or free_port(spec.http.host)})
    canary = spec.canary
    if canary is not None:
        canary = canary.model_copy(update={"members": _absolute(canary.members), "heads": _path(canary.heads)})
    given = {"members": _absolute(spec.members), "heads": _path(spec.heads), "http": http, "canary": canary}
    return spec.model_copy(update=given | {"plugins": resolved_plugins(spec.plugins)})


def version_of(spec: ServeSpec, keys: KeyRing) -> str:
    """What a replica is made of, as 12 hex digits: two specs of one version differ only in how many they want."""
    digest = hashlib.sha256(package_version("tigerbot-platform").encode())
    digest.update(json.dumps(spec.model_dump(mode="json", exclude=_NOT_VERSION), sort_keys=True).encode())
    digest.update(keys.identity.encode())
    for folder in _folders(spec).values():
        for file in sorted(path for path in Path(folder).glob("*") if path.is_file()):
            about = file.stat()
            digest.update(f"{file}:{about.st_size}:{about.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def _check_weights(folder: Path, where: str) -> None:
    """Every file of weights has a readable head and all its bytes."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError("has no safetensors", where=where, fix="give a folder with weights")
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file.name} is damaged ({error})", where=where, fix="copy it here again") from None


def _hashes(members: MembersSpec) -> dict[str, str]:
    assert members.factual is not None
    return {
        "creative_hash": model_hash(members.creative),
        "factual_hash": model_hash(members.factual),
        "tokenizer_hash": tokenizer_hash(members.creative),
        "quantisation": quantisation(members.dtype),
    }


def _absolute(members: MembersSpec) -> MembersSpec:
    return members.model_copy(update={role: _path(getattr(members, role)) for role in ROLES})


def _path(folder: str | None) -> str | None:
    return None if folder is None else str(Path(folder).absolute())


def _pairs(spec: ServeSpec) -> list[tuple[str | None, MembersSpec]]:
    """Heads and members that belong together: the rest's, and the canary's."""
    canary = spec.canary
    return [(spec.heads, spec.members), *([(canary.heads, canary.members)] if canary else [])]


def _folders(spec: ServeSpec) -> dict[str, str]:
    found: dict[str, str | None] = {}
    for prefix, (heads, members) in zip(("", "canary."), _pairs(spec), strict=False):
        found |= {f"{prefix}members.{role}": getattr(members, role) for role in ROLES}
        found[f"{prefix}heads"] = heads
    return {field: folder for field, folder in found.items() if folder is not None}

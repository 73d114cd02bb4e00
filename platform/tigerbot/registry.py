"""The registry of models: versions of one registered model, and the aliases that point at them.

Weights stay where the run wrote them: a version points there by the tag `tiger.folder`. Where an alias has been is kept
beside it, as a tag of the registered model: written before the alias moves, so a death in between loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tigerbot.errors import TrackingError, first_line
from tigerbot.mlflow_client import FOLDER, mlflow_client

REGISTERED_MODEL = "tiger"
_KEPT = 50  # places of an alias that are remembered: MLflow's tags hold 5,000 characters


@dataclass(frozen=True)
class Place:
    """Where an alias was moved to: a version, when (in ms), and whether that was taken back."""

    version: str
    at: int
    undone: bool = False


def resolve_alias(uri: str, alias: str) -> Path:
    """The folder of the model an alias points at.

    Raises:
        TrackingError: no model has this alias.
    """
    return resolve_aliases(uri, [alias])[alias]


def resolve_aliases(uri: str, aliases: Iterable[str]) -> dict[str, Path]:
    """The folders of the models that aliases point at, asked in one go.

    Raises:
        TrackingError: no model has one of them.
    """
    with mlflow_client(uri) as api:
        return {alias: Path(_at_alias(api, uri, alias).tags[FOLDER]) for alias in aliases}


def register(api: Any, run_id: str, folder: str, alias: str, at: int, tags: Mapping[str, str] | None = None) -> str:
    """Make a version of a run's model and move the alias to it; said again with the same time, it changes nothing.

    Args:
        api: an `MlflowClient`.
        at: when it was said, in ms. Repeated late, it would take the alias back from a version registered since.
        tags: of the version, set before the alias moves.

    Returns:
        the version.
    """
    from mlflow.exceptions import MlflowException

    try:
        api.create_registered_model(REGISTERED_MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = api.search_model_versions(f"name='{REGISTERED_MODEL}' and run_id='{run_id}'")
    version = next((v for v in made if v.tags.get(FOLDER) == folder), None)
    if version is None:
        version = api.create_model_version(
            REGISTERED_MODEL, f"runs:/{run_id}/model", run_id, tags={FOLDER: folder}, await_creation_for=0
        )
    for name, value in (tags or {}).items():
        api.set_model_version_tag(REGISTERED_MODEL, version.version, name, value)
    _move(api, alias, Place(str(version.version), at))
    return str(version.version)


def take_back(api: Any, uri: str, alias: str) -> str:
    """Move an alias to where it was before; returns that version.

    Raises:
        TrackingError: there is no such alias, or it was nowhere before.
    """
    now = str(_at_alias(api, uri, alias).version)
    places = history(api, alias)
    stood = [place for place in places if not place.undone]
    here = max((index for index, place in enumerate(stood) if place.version == now), default=len(stood))
    before = next((place for place in reversed(stood[:here]) if place.version != now), None)
    if before is None:
        raise TrackingError(f"{alias!r} was nowhere before version {now}", where=uri, fix="promote another run")
    api.set_registered_model_alias(REGISTERED_MODEL, alias, before.version)
    later = set(stood[stood.index(before) + 1 :])
    _remember(api, alias, [replace(place, undone=place.undone or place in later) for place in places])
    return before.version


def history(api: Any, alias: str) -> list[Place]:
    """Where an alias has been, oldest first; nothing for one that nobody moved yet."""
    found = api.search_registered_models(f"name='{REGISTERED_MODEL}'")
    return [Place(**place) for model in found for place in json.loads(model.tags.get(_tag(alias), "[]"))]


def _move(api: Any, alias: str, place: Place) -> None:
    places = history(api, alias)
    known = replace(place, undone=True) in places or place in places
    if known and place != places[-1]:
        return  # it has been elsewhere since
    if not known:
        _remember(api, alias, [*places, place])
    api.set_registered_model_alias(REGISTERED_MODEL, alias, place.version)


def _remember(api: Any, alias: str, places: list[Place]) -> None:
    api.set_registered_model_tag(
        REGISTERED_MODEL, _tag(alias), json.dumps([asdict(place) for place in places[-_KEPT:]])
    )


def _tag(alias: str) -> str:
    return f"tiger.places.{alias}"


def _at_alias(api: Any, uri: str, alias: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return api.get_model_version_by_alias(REGISTERED_MODEL, alias)
    except MlflowException as error:
        raise TrackingError(
            f"no model has the alias {alias!r} ({first_line(error)})", where=uri, fix="register one"
        ) from None

"""The registry of models: versions of one registered model, and the aliases that point at them.

Weights stay where the run wrote them: a version points there by the tag `tiger.folder`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tigerbot.errors import TrackingError, first_line
from tigerbot.mlflow_server import serve_tracking

REGISTERED_MODEL = "tiger"
_FOLDER = "tiger.folder"
_MOVED = "tiger.alias_moved"


def resolve_alias(uri: str, alias: str) -> Path:
    """The folder of the model an alias points at.

    Raises:
        TrackingError: no model has this alias.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    server = serve_tracking(uri)
    try:
        version = MlflowClient(server.url).get_model_version_by_alias(REGISTERED_MODEL, alias)
    except MlflowException as error:
        raise TrackingError(
            f"no model has the alias {alias!r} ({first_line(error)})", where=uri, fix="register one"
        ) from None
    finally:
        server.stop()
    return Path(version.tags[_FOLDER])


def register(api: Any, run_id: str, folder: str, alias: str, at: int) -> None:
    """Make a version of a run's model and move the alias to it; said again with the same time, it changes nothing.

    Args:
        api: an `MlflowClient`.
        at: when it was said, in ms. Repeated late, it would take the alias back from a version registered since.
    """
    from mlflow.exceptions import MlflowException

    try:
        api.create_registered_model(REGISTERED_MODEL)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    made = api.search_model_versions(f"name='{REGISTERED_MODEL}' and run_id='{run_id}'")
    version = next((v for v in made if v.tags.get(_FOLDER) == folder), None)
    if version is None:
        version = api.create_model_version(
            REGISTERED_MODEL, f"runs:/{run_id}/model", run_id, tags={_FOLDER: folder}, await_creation_for=0
        )
    moved = f"{alias} {at}"
    if version.tags.get(_MOVED) != moved:
        api.set_registered_model_alias(REGISTERED_MODEL, alias, version.version)
        api.set_model_version_tag(REGISTERED_MODEL, version.version, _MOVED, moved)

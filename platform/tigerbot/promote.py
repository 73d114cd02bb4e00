"""`tiger promote`: an alias of the registry moves to a run's model, once that was measured; and back.

What a serving spec names (`alias: factual`) is then this model. The move is one request to MLflow, so a reader finds the
old model or the new one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tigerbot.errors import ModelError, TrackingError
from tigerbot.listing import run_folder
from tigerbot.mlflow_client import FOLDER, mlflow_client, run_of_folder
from tigerbot.registry import REGISTERED_MODEL, history, register, take_back
from tigerbot.runs import read_json

_EVALUATION = "tiger.evaluation"
_TAG_LIMIT = 5000  # characters, MLflow's


@dataclass(frozen=True)
class Checked:
    """A run whose model may be promoted, and by what it was measured."""

    folder: Path
    tracking: dict[str, Any]
    held_out: float | None
    evaluation: dict[str, Any]


def promote(storage: Path, name: str, alias: str, evaluation: str | None = None) -> str:
    """Move `alias` to the model of a run; returns a line that says so.

    Args:
        evaluation: a finished run of `kind: eval`, attached beside the held-out loss of the training.

    Raises:
        ModelError: the model is not whole, or nothing measured it.
        TrackingError: MLflow does not know the run.
    """
    checked = _checked(storage, name, evaluation)
    uri = checked.tracking["uri"]
    with mlflow_client(uri) as api:
        run_id = run_of_folder(api, checked.tracking["experiment"], checked.folder, "train")
        if run_id is None:
            raise TrackingError("has no run of this folder", where=uri, fix="was it trained with another tracking.uri?")
        tags = {_EVALUATION: json.dumps(checked.evaluation, ensure_ascii=False)[:_TAG_LIMIT]}
        version = register(api, run_id, str(checked.folder / "model"), alias, int(time.time() * 1000), tags)
    return f"{alias}: version {version}, {name} ({_measured(checked)})"


def undo(uri: str, alias: str) -> str:
    """Move `alias` to where it was before; returns a line that says so.

    Raises:
        TrackingError: there is no such alias, or it was nowhere before.
    """
    with mlflow_client(uri) as api:
        version = take_back(api, uri, alias)
        folder = api.get_model_version(REGISTERED_MODEL, version).tags[FOLDER]
    return f"{alias}: version {version} again, {folder}"


def lines(uri: str, alias: str) -> Iterator[str]:
    """Where an alias has been, oldest first, with what each version was measured by."""
    with mlflow_client(uri) as api:
        places = history(api, alias)
        if not places:
            yield f"{alias} was nowhere yet"
        for place in places:
            version = api.get_model_version(REGISTERED_MODEL, place.version)
            when = datetime.fromtimestamp(place.at / 1000).isoformat(" ", "seconds")
            taken_back = ", taken back" if place.undone else ""
            told = version.tags.get(_EVALUATION, "")
            yield f"{when}  version {place.version}{taken_back}  {version.tags.get(FOLDER, '')}  {told[:200]}"


def _checked(storage: Path, name: str, evaluation: str | None) -> Checked:
    folder = run_folder(storage, name).absolute()
    spec, state = read_json(folder / "spec.json", {})["spec"], read_json(folder / "state.json", {"status": "new"})
    if spec["kind"] != "train":
        raise ModelError(f"is a {spec['kind']}, which has no model", where=name, fix="promote a run of `kind: train`")
    if state["status"] != "done":
        raise ModelError(f"is {state['status']}, not done", where=name, fix=f"run it to its end: tiger run {name}.yaml")
    _whole(folder / "model", name)
    held_out = (state.get("result") or {}).get("validation_loss")
    measured = {} if evaluation is None else _evaluation(storage, evaluation, after=float(state.get("ended", 0)))
    if held_out is None and not measured:
        raise ModelError(
            "was never measured: no held-out loss, no evaluation",
            where=name,
            fix="give data.validation when training, or --evaluation with a run of `kind: eval`",
        )
    if held_out is not None and not math.isfinite(held_out):
        raise ModelError(f"has a held-out loss of {held_out}", where=name, fix="train it again with a lower rate")
    return Checked(folder, spec["tracking"], held_out, {"held_out_loss": held_out} | measured)


def _whole(model: Path, name: str) -> None:
    """Every file of weights has a readable head and all its bytes."""
    from safetensors import SafetensorError, safe_open

    files = sorted(model.glob("*.safetensors"))
    if not files or not list(model.glob("*config.json")):
        raise ModelError("has no model", where=str(model), fix=f"tiger run {name}.yaml")
    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"is damaged ({error})", where=str(file), fix="train it again, or restore it") from None


def _evaluation(storage: Path, name: str, after: float) -> dict[str, Any]:
    folder = run_folder(storage, name)
    spec, state = read_json(folder / "spec.json", {})["spec"], read_json(folder / "state.json", {"status": "new"})
    if spec["kind"] != "eval" or state["status"] != "done":
        raise ModelError(
            f"is a {spec['kind']} that is {state['status']}", where=name, fix="give a finished run of `kind: eval`"
        )
    if float(state.get("ended", 0)) < after:
        raise ModelError("was over before this model was trained", where=name, fix=f"tiger run {name}.yaml --replace")
    return {"evaluation": name, "result": state.get("result")}


def _measured(checked: Checked) -> str:
    parts = [] if checked.held_out is None else [f"held-out loss {checked.held_out:.4g}"]
    if "evaluation" in checked.evaluation:
        parts.append(f"evaluation {checked.evaluation['evaluation']}")
    return ", ".join(parts)

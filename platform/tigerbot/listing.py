"""What lies in a storage folder: its runs, and a run's model as one that plain transformers loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tigerbot.errors import InputError
from tigerbot.runs import is_held, read_json


@dataclass(frozen=True)
class Listed:
    """One run. `state` is new, running, done, failed, or interrupted (it says running and nobody works on it)."""

    name: str
    kind: str
    state: str
    size_bytes: int
    note: str


def listed(folder: Path) -> list[Listed]:
    """The runs below a storage folder, by name.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(folder), fix="give a storage folder, e.g. tiger-runs")
    return [_listed(spec.parent) for spec in sorted(folder.glob("*/spec.json"))]


def export_model(run: Path, target: Path) -> Path:
    """Merge a run's adapters into its base and write the whole model with its tokenizer.

    Raises:
        InputError: the target exists.
        ModelError: there is no model in the run.
    """
    from tigerbot.models import load_model, load_tokenizer, save_model

    if target.exists():
        raise InputError("is there already", where=str(target), fix="give a folder that does not exist")
    folder = run / "model" if (run / "model").is_dir() else run
    model = load_model(folder)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    return save_model(model, load_tokenizer(folder), target)


def _listed(folder: Path) -> Listed:
    about, state = read_json(folder / "spec.json", {}), read_json(folder / "state.json", {"status": "new"})
    status = state["status"]
    if status == "running" and not is_held(folder):
        status = "interrupted"
    result = state.get("result") or {}
    note = state.get("error", "") or ", ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Listed(folder.name, about.get("spec", {}).get("kind", "?"), status, size, note[:100])

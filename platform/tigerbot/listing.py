"""What lies in a storage folder: its runs, how two of them differ, and what of them can go."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tigerbot.errors import InputError
from tigerbot.runs import holder, read_json
from tigerbot.spec import flat
from tigerbot.storage import open_store


@dataclass(frozen=True)
class Listed:
    """One run. `state` is new, running, done, failed, or interrupted (it says running and nobody works on it)."""

    name: str
    kind: str
    state: str
    size_bytes: int
    note: str

    def line(self) -> str:
        return f"{self.name:<24} {self.kind:<7} {self.state:<12} {self.size_bytes / 1e6:>9.1f} MB  {self.note}"


def listed(folder: Path) -> list[Listed]:
    """The runs below a storage folder, by name.

    Raises:
        InputError: there is no such folder.
    """
    if not folder.is_dir():
        raise InputError("there is no such folder", where=str(folder), fix="give a storage folder, e.g. tiger-runs")
    return [_listed(spec.parent) for spec in sorted(folder.glob("*/spec.json"))]


def compared(folder: Path, names: tuple[str, str]) -> list[str]:
    """Lines `field: a | b` of what two runs were told and found, where they differ.

    Raises:
        InputError: there is no such run.
    """
    first, second = (_told_and_found(run_folder(folder, name)) for name in names)
    keys = [key for key in sorted({*first, *second}) if first.get(key) != second.get(key)]
    return [f"{key}: {_shown(first.get(key))} | {_shown(second.get(key))}" for key in keys]


def delete(folder: Path, name: str) -> int:
    """Remove a run with its checkpoints; returns the bytes that were freed here. Its rows in MLflow stay.

    Raises:
        InputError: there is no such run, or a process works on it.
    """
    run = _idle(run_folder(folder, name))
    size = _size(run)
    uri = read_json(run / "spec.json", {}).get("spec", {}).get("storage", {}).get("uri", "")
    if uri.startswith("s3://"):
        open_store(uri).delete(name)
    gone = run.with_name(f".deleting-{name}-{os.getpid()}")  # one rename: no reader finds half a run
    run.rename(gone)
    shutil.rmtree(gone)
    return size


def collect(folder: Path, keep: int) -> list[tuple[str, int]]:
    """Drop old checkpoints of runs that are done, all but `keep` of each; gives (run, checkpoints dropped)."""
    found = []
    for one in listed(folder):
        run = folder / one.name
        spec = read_json(run / "spec.json", {}).get("spec", {})
        if one.state != "done" or spec.get("kind") != "train":
            continue
        uri = spec.get("storage", {}).get("uri", "")
        store = open_store(uri if uri.startswith("s3://") else str(folder))
        dropped = store.retain(f"{one.name}/checkpoints", keep)
        if dropped:
            found.append((one.name, len(dropped)))
    return found


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


def run_folder(folder: Path, name: str) -> Path:
    """The folder of a run.

    Raises:
        InputError: there is no such run.
    """
    if not (folder / name / "spec.json").is_file():
        names = ", ".join(one.name for one in listed(folder)) or "none"
        raise InputError(f"no run is called {name!r} (there is: {names})", where=str(folder), fix="see `tiger runs`")
    return folder / name


def _idle(run: Path) -> Path:
    pid = holder(run)
    if pid is not None:
        who = f"process {pid}" if pid else "another machine"
        raise InputError(f"{who} works on it", where=str(run), fix=f"tiger stop {run.name}")
    return run


def _told_and_found(run: Path) -> dict[str, Any]:
    spec, state = read_json(run / "spec.json", {}).get("spec", {}), read_json(run / "state.json", {})
    return flat({"spec": spec, "state": state.get("status"), "result": state.get("result") or {}})


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _listed(folder: Path) -> Listed:
    about, state = read_json(folder / "spec.json", {}), read_json(folder / "state.json", {"status": "new"})
    status = state["status"]
    if status == "running" and holder(folder) is None:
        status = "interrupted"
    result = state.get("result") or {}
    note = state.get("error", "") or ", ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, float))
    return Listed(folder.name, about.get("spec", {}).get("kind", "?"), status, _size(folder), note[:100])


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

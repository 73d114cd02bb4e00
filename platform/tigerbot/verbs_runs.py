"""The verbs `runs` and `export`. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verbs to the `tiger` command."""
    app.command()(runs)
    app.command()(export)


def runs(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="a storage folder")] = Path("tiger-runs"),
) -> None:
    """List the runs of a storage folder: kind, state, size. Example: tiger runs tiger-runs/demo"""
    from tigerbot.listing import listed

    found = listed(folder)
    for one in found:
        print(f"{one.name:<24} {one.kind:<7} {one.state:<12} {one.size_bytes / 1e6:>9.1f} MB  {one.note}")
    if not found:
        print(f"no runs in {folder}")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, or a model or adapter folder")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="a folder that does not exist yet")],
) -> None:
    """Write a model that plain transformers loads: adapters merged, tokenizer, chat template. Example: tiger export tiger-runs/town-factual --to factual"""
    from tigerbot.listing import export_model

    print(f"exported to {export_model(run, to)}")

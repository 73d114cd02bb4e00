"""The verbs about runs on this machine: `status`, `runs` and `export`. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Option("--in", metavar="FOLDER", help="a storage folder")]
RUNS = Path("tiger-runs")
TRACKING = "sqlite:///tiger-runs/mlflow.db"
runs_app = typer.Typer()


def register(app: typer.Typer) -> None:
    """Add the verbs to the `tiger` command."""
    app.command()(status)
    app.add_typer(runs_app, name="runs")
    app.command()(export)
    app.command()(promote)


def status(folder: Folder = RUNS) -> None:
    """Say what is running on this machine: jobs with their step, endpoints with their health. Example: tiger status"""
    from tigerbot.living import living

    found = living(folder)
    for run in found:
        print(run.line())
    if not found:
        print(f"nothing runs in {folder} (on a cluster: tiger jobs)")


@runs_app.callback(invoke_without_command=True)
def runs(context: typer.Context, folder: Folder = RUNS) -> None:
    """List the runs of a storage folder: kind, state, size. Example: tiger runs --in tiger-runs/demo"""
    if context.invoked_subcommand is not None:
        return
    from tigerbot.listing import listed

    found = listed(folder)
    for one in found:
        print(one.line())
    print(
        f"{len(found)} runs, {sum(one.size_bytes for one in found) / 1e9:.2f} GB" if found else f"no runs in {folder}"
    )


@runs_app.command()
def compare(first: str, second: str, folder: Folder = RUNS) -> None:
    """Show where two runs differ, in spec and result. Example: tiger runs compare a b --in tiger-runs"""
    from tigerbot.listing import compared

    for line in compared(folder, (first, second)):
        print(line)


@runs_app.command()
def delete(
    name: str, folder: Folder = RUNS, yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False
) -> None:
    """Remove a run and its checkpoints; MLflow keeps its rows. Example: tiger runs delete old --yes"""
    from tigerbot.listing import delete as delete_run

    if not yes:
        typer.confirm(f"remove {folder / name} for good?", abort=True)
    print(f"freed {delete_run(folder, name) / 1e6:.1f} MB")


@runs_app.command()
def collect(
    folder: Folder = RUNS, keep: Annotated[int, typer.Option("--keep", min=1, help="checkpoints of each run")] = 1
) -> None:
    """Drop old checkpoints of runs that are done. Example: tiger runs collect --keep 1"""
    from tigerbot.listing import collect as collect_checkpoints

    found = collect_checkpoints(folder, keep)
    for name, dropped in found:
        print(f"{name}: {dropped} checkpoints dropped")
    if not found:
        print("nothing to drop")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder, or a model or adapter folder")],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="a folder that does not exist yet")],
) -> None:
    """Write a model that plain transformers loads: adapters merged, tokenizer, chat template. Example: tiger export tiger-runs/town-factual --to factual"""
    from tigerbot.listing import export_model

    print(f"exported to {export_model(run, to)}")


def promote(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="a finished run of kind train")] = "",
    alias: Annotated[str, typer.Option(help="what serving specs name")] = "",
    evaluation: Annotated[str, typer.Option(metavar="RUN", help="a finished run of kind eval to attach")] = "",
    undo: Annotated[bool, typer.Option("--undo", help="move the alias to where it was before")] = False,
    history: Annotated[bool, typer.Option("--history", help="where the alias has been")] = False,
    tracking: Annotated[str, typer.Option(metavar="URI", help="for --undo and --history")] = TRACKING,
    folder: Folder = RUNS,
) -> None:
    """Move an alias of the registry to a run's model, once it was measured. Example: tiger promote town-factual --alias factual"""
    from tigerbot import promote as promotion
    from tigerbot.errors import InputError

    if not alias or bool(run) == (undo or history):
        raise InputError(
            "wants a run and --alias, or --alias with --undo or --history",
            where="tiger promote",
            fix="tiger promote town-factual --alias factual",
        )
    if undo:
        print(promotion.undo(tracking, alias))
    elif not history:
        print(promotion.promote(folder, run, alias, evaluation or None))
    if history:
        for line in promotion.lines(tracking, alias):
            print(line)

"""The verbs of this package: `tiger demo` and `tiger nodes`. Each imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Option("--in", metavar="FOLDER", help="a storage folder")]
RUNS = Path("tiger-runs")
nodes_app = typer.Typer(help="Nodes that failed: list their faults, keep one out, let one in again.")


def register(app: typer.Typer) -> None:
    """Add this package's verbs to the `tiger` command."""
    app.command()(demo)
    app.add_typer(nodes_app, name="nodes")


def demo(
    exit_after: Annotated[
        bool, typer.Option("--exit", help="ask the fixed questions, write report.html, stop")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="start anew; the old results are removed")] = False,
    model: Annotated[
        str, typer.Option("--model", help="tiny, smollm2, or a folder with a Hugging Face model")
    ] = "tiny",
    folder: Annotated[Path, typer.Option("--folder", help="where every stage keeps its result")] = Path(
        "tiger-runs/demo"
    ),
    port: Annotated[int, typer.Option("--port", help="port of the endpoint on 127.0.0.1; 0 takes a free one")] = 8000,
) -> None:
    """The whole story on this machine: text, base, sweep, two experts, heads, one endpoint with a dial."""
    from tigerbot_jobs.demo.story import Demo

    raise SystemExit(Demo(folder=folder, model=model, port=port).tell(exit_after=exit_after, fresh=fresh))


@nodes_app.callback(invoke_without_command=True)
def nodes(context: typer.Context, folder: Folder = RUNS) -> None:
    """List the faults of nodes, and which nodes are kept out until when. Example: tiger nodes --in tiger-runs"""
    if context.invoked_subcommand is not None:
        return
    from tigerbot_jobs.train.watch.quarantine import node_lines, quarantine_of

    for line in node_lines(quarantine_of(folder)) or [f"no node has failed in {folder}"]:
        print(line)


@nodes_app.command()
def clear(node: str, folder: Folder = RUNS) -> None:
    """Let a node in again; its faults so far count no more. Example: tiger nodes clear node-7"""
    from tigerbot_jobs.train.watch.quarantine import quarantine_of

    was_out = quarantine_of(folder).clear(node)
    print(f"{node} is in again" if was_out else f"{node} was not kept out; its faults so far count no more")


@nodes_app.command()
def quarantine(
    node: str,
    hours: Annotated[float, typer.Option("--hours", metavar="H", help="for how long")],
    folder: Folder = RUNS,
) -> None:
    """Place nothing on a node for some hours. Example: tiger nodes quarantine node-7 --hours 24"""
    from tigerbot_jobs.train.watch.quarantine import quarantine_of

    print(quarantine_of(folder).hold(node, hours).line())

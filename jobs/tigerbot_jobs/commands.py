"""The verbs of this package: `tiger demo`, `tiger simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add this package's verbs to the `tiger` command."""
    app.command()(demo)
    app.command()(simulate)


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


def simulate(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="a YAML spec of kind simulate")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="override a field; repeatable")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="begin anew under this name; the old result is kept aside")
    ] = False,
) -> None:
    """Predict the goodput of a long run on many cards, and what to buy. Example: tiger simulate jobs/simulate.yaml"""
    from tigerbot.errors import InputError
    from tigerbot.runner import run_spec
    from tigerbot.spec import load_spec
    from tigerbot_jobs.simulate.tables import result_lines

    loaded = load_spec(spec, overrides or [])
    if loaded.kind != "simulate":
        raise InputError(f"is a spec of kind {loaded.kind}", where=str(spec), fix="give one of kind simulate")
    for line in result_lines(run_spec(loaded, replace=replace)):
        print(line)

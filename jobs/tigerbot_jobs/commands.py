"""The verbs of this package: `tiger demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add this package's verbs to the `tiger` command."""
    app.command()(demo)


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
    """Tell the whole story here: text, base, sweep, two experts, heads, one endpoint with a dial. Example: tiger demo --exit --port 0"""
    from tigerbot_jobs.demo.story import Demo

    raise SystemExit(Demo(folder=folder, model=model, port=port).tell(exit_after=exit_after, fresh=fresh))

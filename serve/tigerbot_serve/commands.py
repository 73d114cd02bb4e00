"""The verbs of this package: `tiger serve`, `tiger chat`, `tiger keys` and `tiger bench`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tigerbot.options import Overrides, SpecFile
from tigerbot_serve.bench.verb import bench
from tigerbot_serve.key_commands import keys_app


def register(app: typer.Typer) -> None:
    """Add this package's verbs to the `tiger` command."""
    app.command()(serve)
    app.command()(chat)
    app.add_typer(keys_app, name="keys")
    app.command()(bench)


def serve(
    spec: SpecFile,
    overrides: Overrides = None,
) -> None:
    """Serve an ensemble until Ctrl-C, or update the one of its name in flight. Example: tiger serve serve/ensemble.yaml --set http.port=8001"""
    from tigerbot.errors import SpecError
    from tigerbot.runner import run_spec
    from tigerbot.runs import holder, local_root
    from tigerbot.spec import ServeSpec, load_spec

    loaded = load_spec(spec, overrides or [])
    if not isinstance(loaded, ServeSpec):
        raise SpecError(f"kind: got {loaded.kind}, wants serve", where=str(spec), fix=f"use `tiger run {spec}`")
    folder = local_root(loaded) / loaded.name
    if holder(folder) is None:
        run_spec(loaded)
        return
    from tigerbot_serve.deploy.handover import hand_over

    print(f"{loaded.name} is served already: updating it", flush=True)
    print(hand_over(loaded, folder, 3 * loaded.scale.start_timeout_s))


def chat(
    message: Annotated[str | None, typer.Argument(metavar="[MESSAGE]", help="ask this and leave")] = None,
    url: Annotated[str, typer.Option("--url", help="the endpoint")] = "http://127.0.0.1:8000",
    creativity: Annotated[float, typer.Option("--creativity", min=0, max=1, help="0 factual ... 1 creative")] = 0.3,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="judge the answer before it is shown")] = False,
    model: Annotated[str, typer.Option("--model")] = "tiger",
) -> None:
    """Talk to an endpoint; the key is in TIGER_API_KEY. Example: tiger chat --creativity 0.8 "写一首关于月亮的小诗。" """
    from tigerbot_serve.client import Client

    client = Client(url, model=model, creativity=creativity, verify=verify)
    if message is not None:
        client.ask(message)
        return
    if not sys.stdin.isatty():
        client.ask(sys.stdin.read().strip())
        return
    print("/creativity 0.8 turns the dial, /new begins anew, Ctrl-D leaves.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if line:
            client.command(line)

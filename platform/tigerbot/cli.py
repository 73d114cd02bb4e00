"""The `tiger` command. Each verb imports what it needs when it runs, so that `tiger --help` is quick.

Other packages add their verbs through the entry-point group `tigerbot.commands`: a function `register(app)` in a
module that imports nothing heavy at its top.
"""

from __future__ import annotations

import importlib
import json
import signal
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from tigerbot.errors import TigerError
from tigerbot.options import Extend, Overrides, Replace, SpecFile

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
spec_app = typer.Typer(no_args_is_help=True, help="Specs: their schemas, and what one resolves to.")
_INTERRUPTED = 130
_SHOWN = 20  # entries of a list in a result
app.add_typer(spec_app, name="spec")


@app.callback()
def root() -> None:
    """Train, tune and serve your own language models: jobs that do not stop, sweeps that lose nothing, a dial."""


@app.command()
def run(
    spec: SpecFile,
    overrides: Overrides = None,
    replace: Replace = False,
    extend: Extend = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the resolved spec and what it would do, start nothing")
    ] = False,
) -> None:
    """Run a job here, in this terminal. Example: tiger run jobs/pretrain.yaml --set train.lr=1e-3"""
    from tigerbot.spec import load_spec, spec_hash

    loaded = load_spec(spec, overrides or [])
    if dry_run:
        about = {"hash": spec_hash(loaded), "spec": loaded.model_dump(mode="json")}
        print(json.dumps(about, indent=2, ensure_ascii=False))
        from tigerbot.runner import preview_spec

        for line in preview_spec(loaded):
            print(line)
        return
    from tigerbot.runner import run_spec

    result = run_spec(loaded, replace=replace, extend=extend)
    # The trials of a sweep are thousands; all of them are in the run's state and on its page.
    shown = {name: value for name, value in result.items() if not (isinstance(value, list) and len(value) > _SHOWN)}
    print(json.dumps(shown, indent=2, ensure_ascii=False, default=str))


@spec_app.command("schema")
def spec_schema(kind: Annotated[str, typer.Argument(metavar="KIND")]) -> None:
    """Print the JSON schema of a kind. Example: tiger spec schema train > train.schema.json"""
    from tigerbot.spec import json_schema

    print(json.dumps(json_schema(kind), indent=2, ensure_ascii=False))


def add_verbs() -> None:
    """Add the verbs of every installed package."""
    for point in entry_points(group="tigerbot.commands"):
        module, _, name = point.value.partition(":")
        getattr(importlib.import_module(module), name)(app)


def main() -> None:
    """Entry point: one line and an exit status for every mistake, a traceback only for a bug."""
    add_verbs()
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        app()
    except TigerError as error:
        print(f"tiger: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # Typer makes this of a KeyboardInterrupt, without a word
            print("tiger: interrupted; the same command goes on", file=sys.stderr)
        raise
    except Exception as error:
        from tigerbot.staging import disk_full, is_full

        if not is_full(error):
            raise
        print(f"tiger: {disk_full(getattr(error, 'filename', None) or Path.cwd())}", file=sys.stderr)
        raise SystemExit(1) from None


def _interrupted(_signal: int, _frame: Any) -> None:
    """SIGTERM (of `tiger stop`, a cluster, systemd) ends a job as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()

"""Options that several verbs of the command have. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="a YAML spec file")]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="override a field; repeatable")]
Replace = Annotated[bool, typer.Option("--replace", help="begin anew under this name; the old run is kept aside")]
Extend = Annotated[bool, typer.Option("--extend", help="go on: the spec wants more tokens or trials, all else equal")]

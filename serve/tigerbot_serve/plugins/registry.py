"""Which plug-ins there are. A spec says which are on and how; a request names some of those, and brings no code.

A plug-in of your own: a `Part` with its `name` and parameters in `tigerbot/spec/plugins.py`, a class here that is made
from it and has `look_up`, and a line in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tigerbot.errors import DataError
from tigerbot.spec import PluginSpec
from tigerbot_serve.ensemble.evidence import Evidence, Inquiry
from tigerbot_serve.plugins.calculator import Calculator
from tigerbot_serve.plugins.rethink import Rethink
from tigerbot_serve.plugins.search import Search


class Plugin(Protocol):
    """Something that finds evidence. `look_up` runs in a thread of its own and may take `deadline_s`."""

    deadline_s: float

    def look_up(self, inquiry: Inquiry) -> Sequence[Evidence]: ...


KINDS: dict[str, Callable[[Any], Plugin]] = {"search": Search, "rethink": Rethink, "calculator": Calculator}
_FILES = ("corpus", "encyclopaedia")


def load_plugins(specs: Sequence[PluginSpec]) -> dict[str, Plugin]:
    """The plug-ins of a spec by name, with what they read in memory.

    Raises:
        DataError: a file is missing or not what it should be.
    """
    return {spec.name: KINDS[spec.name](spec) for spec in specs}


def resolved(specs: Sequence[PluginSpec]) -> list[PluginSpec]:
    """The same with absolute paths, for a replica that runs elsewhere.

    Raises:
        DataError: a file or folder is not there.
    """
    found = []
    for spec in specs:
        paths = {field: Path(value).absolute() for field in _FILES if (value := getattr(spec, field, None))}
        for field, path in paths.items():
            if not path.exists():
                raise DataError(
                    "there is no such file or folder",
                    where=f"plugins {spec.name}.{field}: {getattr(spec, field)}",
                    fix="give a JSONL or text file",
                )
        found.append(spec.model_copy(update={field: str(path) for field, path in paths.items()}))
    return found

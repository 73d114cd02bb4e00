"""How a verb finds what it was asked about: a run by name in a storage folder, by its folder, or by the file itself."""

from __future__ import annotations

import difflib
from pathlib import Path

from tigerbot.errors import InputError
from tigerbot.runs import holder, read_json


def find_record(run: str, folder: Path, file: str, *, kind: str, what: str, begins: str) -> Path:
    """The file of this name that runs of one kind keep: a ledger, a journal.

    Args:
        what: the file in one word, `begins` what it begins with: for the message where there is none yet.

    Raises:
        InputError: there is no such run, or it keeps no such file.
    """
    try:
        for path in (folder / run / file, Path(run) / file, Path(run)):
            if path.is_file():
                return path
    except OSError as error:  # a name too long for any file, a folder of somebody else's
        raise InputError(str(error.strerror).lower(), where=run[:100], fix=f"give a run or a {what}") from None
    for place in (folder / run, Path(run)):
        found = read_json(place / "spec.json", {}).get("spec", {}).get("kind")
        if found == kind:
            raise InputError(f"has no {what} yet", where=str(place), fix=f"it begins with {begins}")
        if found:
            fix = f"only kind: {kind} keeps a {what}"
            raise InputError(f"is a run of kind {found}", where=str(place), fix=fix)
    names = sorted(found.parent.name for found in folder.glob(f"*/{file}"))
    near = difflib.get_close_matches(Path(run).name, names, n=1, cutoff=0.5)
    fix = f"did you mean {near[0]}?" if near else f"there is: {', '.join(names) or f'no run with a {what}'}"
    raise InputError(f"no run is called {run!r}", where=str(folder), fix=fix)


def is_held(folder: Path) -> bool:
    """Whether a living process works on the run in this folder."""
    try:
        return holder(folder) is not None
    except OSError:
        return False  # somebody else's folder: what is written is all that can be known

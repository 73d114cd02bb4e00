"""A second `tiger serve` of a name hands its spec to the process that keeps the endpoint, and waits for what became of it.

The two meet in the run's folder, which is also how they find each other: a question and an answer, each one file that
is written whole. The one that keeps the endpoint owns Ray, the lock and the terminal; the other leaves when it knows.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tigerbot.errors import InputError, ServeError, TigerError
from tigerbot.runs import holder, read_json, write_json
from tigerbot.spec import ServeSpec, parse_spec

_ASKED, _ANSWERED = "update.json", "updated.json"
POLL_S = 0.2


@dataclass(frozen=True)
class Asked:
    """An update that waits to be made."""

    id: str
    spec: ServeSpec


def hand_over(spec: ServeSpec, folder: Path, deadline_s: float) -> str:
    """Have the process that holds this run serve another spec; returns its line about that.

    Raises:
        InputError: the spec cannot be served.
        ServeError: it did not start, or nobody answered.
    """
    asked = uuid.uuid4().hex
    write_json(folder / _ASKED, {"id": asked, "spec": spec.model_dump(mode="json")})
    until = time.monotonic() + deadline_s
    while (answer := read_json(folder / _ANSWERED, {})).get("id") != asked:
        if holder(folder) is None:
            (folder / _ASKED).unlink(missing_ok=True)
            raise ServeError("its process ended before it was updated", where=spec.name, fix="tiger serve it again")
        if time.monotonic() > until:
            raise ServeError(f"no answer in {deadline_s:.0f} s", where=spec.name, fix="see the terminal that serves it")
        time.sleep(POLL_S)
    if "error" in answer:
        kind = InputError if answer["exit_code"] == InputError.exit_code else ServeError
        raise kind(**answer["error"])
    return answer["said"]


def take_update(folder: Path, update: Callable[[ServeSpec], str]) -> str | None:
    """Make the update that waits in a run's folder, if one does; returns a line about it."""
    asked = _taken(folder)
    if asked is None:
        return None
    try:
        said = update(asked.spec)
        answer: dict[str, object] = {"said": said}
    except TigerError as error:
        said = f"not updated, the old version serves on: {error}"
        about = {"what": f"{error.what} (the old version serves on)", "where": error.where, "fix": error.fix}
        answer = {"error": about, "exit_code": error.exit_code}
    write_json(folder / _ANSWERED, {"id": asked.id} | answer)
    return said


def forget(folder: Path) -> None:
    """What was asked of a process that is gone is asked of nobody."""
    for name in (_ASKED, _ANSWERED):
        (folder / name).unlink(missing_ok=True)


def _taken(folder: Path) -> Asked | None:
    path = folder / _ASKED
    found = read_json(path, None)
    if found is None:
        return None
    path.unlink(missing_ok=True)
    spec = parse_spec(found["spec"], where=str(path))
    assert isinstance(spec, ServeSpec)
    return Asked(found["id"], spec)

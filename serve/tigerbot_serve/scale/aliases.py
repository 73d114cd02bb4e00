"""Members by name: `models:/tiger@factual` is the folder that alias points at in MLflow's registry, now or as it moves.

The canary's members too: what an alias is moved to can be tried on a share of the callers first.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path

from tigerbot.errors import InputError, TrackingError
from tigerbot.registry import REGISTERED_MODEL, resolve_aliases
from tigerbot.spec import MembersSpec, ServeSpec

FOLLOW_S = 10.0
_ROLES = ("base", "creative", "factual")


def aliases_of(spec: ServeSpec) -> dict[str, str]:
    """The aliases a spec names, by the field that names them.

    Raises:
        InputError: a name is not `models:/tiger@ALIAS`.
    """
    found = _named("members", spec.members)
    return found | _named("canary.members", spec.canary.members) if spec.canary else found


def with_folders(spec: ServeSpec) -> ServeSpec:
    """The spec with folders in place of aliases.

    Raises:
        InputError: a name is not an alias of ours.
        TrackingError: the registry does not answer, or no model has the alias.
    """
    named = aliases_of(spec)
    if not named:
        return spec
    folders = resolve_aliases(spec.tracking.uri, set(named.values()))
    found = {field: str(folders[alias]) for field, alias in named.items()}
    update: dict[str, object] = {"members": _placed("members", spec.members, found)}
    if spec.canary:
        members = _placed("canary.members", spec.canary.members, found)
        update["canary"] = spec.canary.model_copy(update={"members": members})
    return spec.model_copy(update=update)


class Follower:
    """Asks the registry now and then, in a thread of its own, and remembers when an alias has moved."""

    def __init__(self, spec: ServeSpec, every_s: float = FOLLOW_S) -> None:
        self._uri, self._aliases, self._every_s = spec.tracking.uri, sorted({*aliases_of(spec).values()}), every_s
        self._moved, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: dict[str, Path] | None = None
        self.trouble = ""
        if spec.follow and self._aliases:
            self._thread = threading.Thread(target=self._follow, name="tiger-follow", daemon=True)
            self._thread.start()

    def moved(self) -> bool:
        """Whether an alias has moved since this was last asked."""
        moved = self._moved.is_set()
        self._moved.clear()
        return moved

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _follow(self) -> None:
        while True:
            try:
                now = resolve_aliases(self._uri, self._aliases)
                self.trouble = ""
                if self._seen not in (None, now):
                    self._moved.set()
                self._seen = now
            except TrackingError as error:
                self.trouble = str(error)
            if self._ended.wait(self._every_s):
                return


def _named(where: str, members: MembersSpec) -> dict[str, str]:
    given = {f"{where}.{role}": getattr(members, role) or "" for role in _ROLES}
    return {field: _alias(field, text) for field, text in given.items() if text.startswith("models:")}


def _placed(where: str, members: MembersSpec, folders: dict[str, str]) -> MembersSpec:
    found = {role: folders[f"{where}.{role}"] for role in _ROLES if f"{where}.{role}" in folders}
    return members.model_copy(update=found)


def _alias(field: str, text: str) -> str:
    match = re.fullmatch(rf"models:/{REGISTERED_MODEL}@([\w.-]+)", text)
    if match is None:
        raise InputError(
            f"got {text!r}, wants models:/{REGISTERED_MODEL}@ALIAS",
            where=field,
            fix="see `tiger promote --history`",
        )
    return match[1]

"""Members by name: `models:/tiger@factual` is the folder that alias points at in MLflow's registry, now or as it moves."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from tigerbot.errors import InputError, TrackingError
from tigerbot.registry import REGISTERED_MODEL, resolve_aliases
from tigerbot.spec import ServeSpec

FOLLOW_S = 10.0
_ROLES = ("base", "creative", "factual")


def aliases_of(spec: ServeSpec) -> dict[str, str]:
    """The aliases a spec names, by member.

    Raises:
        InputError: a name is not `models:/tiger@ALIAS`.
    """
    given = {role: getattr(spec.members, role) or "" for role in _ROLES}
    return {role: _alias(role, text) for role, text in given.items() if text.startswith("models:")}


def with_folders(spec: ServeSpec) -> ServeSpec:
    """The spec with folders in place of aliases.

    Raises:
        InputError: a name is not an alias of ours.
        TrackingError: the registry does not answer, or no model has the alias.
    """
    named = aliases_of(spec)
    if not named:
        return spec
    folders = resolve_aliases(spec.tracking.uri, named.values())
    found = {role: str(folders[alias]) for role, alias in named.items()}
    return spec.model_copy(update={"members": spec.members.model_copy(update=found)})


class Follower:
    """Asks the registry now and then, in a thread of its own, and remembers when an alias has moved."""

    def __init__(self, spec: ServeSpec, every_s: float = FOLLOW_S) -> None:
        self._uri, self._aliases, self._every_s = spec.tracking.uri, sorted(aliases_of(spec).values()), every_s
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


def _alias(role: str, text: str) -> str:
    match = re.fullmatch(rf"models:/{REGISTERED_MODEL}@([\w.-]+)", text)
    if match is None:
        raise InputError(
            f"got {text!r}, wants models:/{REGISTERED_MODEL}@ALIAS",
            where=f"members.{role}",
            fix="see `tiger promote --history`",
        )
    return match[1]

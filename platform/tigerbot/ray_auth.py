"""Ray's cluster token: where this machine's is, and the header that carries it.

Ray 2.60 looks in `RAY_AUTH_TOKEN`, then the file `RAY_AUTH_TOKEN_PATH` names, then `~/.ray/auth_token`, and its own job
client sends the token only where `RAY_AUTH_MODE=token` is set. Ours sends it wherever there is one and the mode is not
`disabled`, so that a forgotten variable is no riddle.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tigerbot.errors import ClusterError


@dataclass(frozen=True)
class Token:
    """A cluster token and where it was found. `repr` does not show it."""

    source: str
    value: str

    def __repr__(self) -> str:
        return f"Token({self.source})"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.value}"}


def auth_mode() -> str:
    """`token`, `disabled`, or `` where nothing is set."""
    return os.environ.get("RAY_AUTH_MODE", "").lower()


def find_token() -> Token | None:
    """The token this machine would send.

    Raises:
        ClusterError: `RAY_AUTH_TOKEN_PATH` names a file that cannot be read.
    """
    if auth_mode() == "disabled":
        return None
    value = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if value:
        return Token("RAY_AUTH_TOKEN", value)
    named = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    path = Path(named or Path.home() / ".ray" / "auth_token").expanduser()
    try:
        value = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        if not named:
            return None
        reason = f"names a file that cannot be read ({error.strerror})"
        raise ClusterError(reason, where=f"RAY_AUTH_TOKEN_PATH={named}", fix="correct the path") from None
    return Token(str(path), value) if value else None

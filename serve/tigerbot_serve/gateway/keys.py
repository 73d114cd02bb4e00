"""API keys: who asks, found by the key's id and compared in constant time. Only digests are kept.

Keys come from an environment variable, from a key file (`tiger keys new`), or from both. A key file is read again when it
changes, looked at no more than once a second; one that is broken leaves the old keys in force. Keys are long and random,
so that a fast hash is enough; what a memory dump or a pickled deployment shows is digests.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tigerbot.errors import InputError
from tigerbot_serve.gateway.errors import ApiError
from tigerbot_serve.gateway.key_file import SCOPES, KeyLimits, read_key_file

log = logging.getLogger(__name__)

POLL_S = 1.0
PREFIX = "sk-tiger-"
_NOBODY = b"\0" * 32  # compared with where an id is unknown, so that it takes as long; no SHA-256 is all zeros


@dataclass(frozen=True)
class Key:
    """A key that was let in.

    Attributes:
        expires: seconds since the epoch; infinity never.
        limits: its own, over the spec's.
    """

    id: str
    user: str
    digest: bytes = _NOBODY
    expires: float = float("inf")
    scopes: frozenset[str] = frozenset(SCOPES)
    limits: KeyLimits | None = None


OPEN = Key("open", "open", scopes=frozenset({"chat", "embeddings", "files"}))


class KeyRing:
    """The accepted keys. An empty ring is an open door: `deploy` allows it on loopback only.

    Args:
        digests: SHA-256 of keys with every scope, that never expire.
        file: a key file.
        clock: seconds since the epoch.

    Raises:
        InputError: the key file is not there or is not one.
    """

    def __init__(
        self, digests: Iterable[bytes] = (), file: Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._file, self._clock = file, clock
        self._fixed = {digest.hex()[:8]: Key(digest.hex()[:8], digest.hex()[:8], digest) for digest in digests}
        self._looked, self._seen = clock(), _stamp(file)
        self._keys = self._fixed | (_keys_of(file) if file else {})

    @classmethod
    def from_environment(cls, name: str, file: str | Path | None = None) -> KeyRing:
        """The comma-separated keys in an environment variable, and those of a key file."""
        keys = [key.strip() for key in os.environ.get(name, "").split(",")]
        return cls((_digest(key) for key in keys if key), Path(file).absolute() if file else None)

    def __bool__(self) -> bool:
        # With a file of no (live) keys nobody is let in: an emptied file does not open the door.
        return bool(self._keys) or self._file is not None

    @property
    def identity(self) -> str:
        """What tells one ring from another: its keys of the environment, and where its file is."""
        return " ".join([*sorted(key.digest.hex() for key in self._fixed.values()), str(self._file or "")])

    def __repr__(self) -> str:
        return f"KeyRing({len(self._keys)} keys)"

    def check(self, authorization: str | None, scope: str | None = None) -> Key:
        """The key in an Authorization header; `OPEN` where no key is needed.

        Args:
            scope: what the key must be good for; None takes any key.

        Raises:
            ApiError: 401, the key is absent, wrong, expired or revoked; 403, it has not this scope.
        """
        self._look()
        key = self._known(authorization) if self else OPEN
        if scope is not None and scope not in key.scopes:
            raise ApiError(403, f"this API key has not the scope {scope!r}", code="insufficient_permissions")
        return key

    def _known(self, authorization: str | None) -> Key:
        scheme, _, secret = (authorization or "").partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not secret:
            raise _refused("no API key: send it as `Authorization: Bearer KEY`")
        digest = _digest(secret)
        key = self._keys.get(_id_of(secret, digest))
        # One look-up and one comparison whatever the id: the time tells nothing of which ids there are.
        if not hmac.compare_digest(digest, key.digest if key else _NOBODY) or key is None:
            raise _refused("this API key is not known here")
        if key.expires <= self._clock():
            raise _refused("this API key has expired; make a new one with `tiger keys new`")
        return key

    def _look(self) -> None:
        if self._file is None or 0 <= self._clock() - self._looked < POLL_S:
            return
        self._looked = self._clock()
        stamp = _stamp(self._file)
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._keys = self._fixed | _keys_of(self._file)
            log.info("%s: read again, %d keys", self._file, len(self._keys))
        except InputError as error:
            log.error("%s (the keys read before stay in force)", error)


def _keys_of(file: Path) -> dict[str, Key]:
    found = {}
    for entry in read_key_file(file).keys:
        if entry.revoked is None:
            expires = entry.expires.timestamp() if entry.expires else float("inf")
            digest = bytes.fromhex(entry.sha256)
            found[entry.id] = Key(entry.id, entry.user, digest, expires, frozenset(entry.scopes), entry.limits)
    return found


def _id_of(secret: str, digest: bytes) -> str:
    """The id that a key of `tiger keys new` carries; of any other text the head of its digest."""
    if secret.startswith(PREFIX):
        return secret[len(PREFIX) :].partition("-")[0]
    return digest.hex()[:8]


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def _stamp(file: Path | None) -> tuple[int, int, int] | None:
    """What differs after every atomic write; None where there is no file."""
    if file is None:
        return None
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_ino, about.st_size


def _refused(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

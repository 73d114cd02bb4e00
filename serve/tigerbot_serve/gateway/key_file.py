"""The key file: users, ids, digests, expiry, scopes and limits as YAML or JSON. What `tiger keys` does to it.

A secret is shown once, when it is made; the file has its SHA-256 only, is written whole or not at all, and only its
owner may read it. A user has at most two live keys: the one in use, and the one that replaces it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator

from tigerbot.errors import InputError
from tigerbot.spec.access import BudgetSpec
from tigerbot.spec.parts import Count, Part

SCOPES = ("chat", "embeddings", "files", "admin")
LIVE_KEYS = 2
FORMAT_VERSION = 1

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one reads a thousand keys in a tenth of the time


def _in_utc(value: Any) -> Any:
    """A time without a zone, as YAML also reads it, is UTC; a date is its first moment."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if not isinstance(value, datetime) and hasattr(value, "isoformat"):
        value = datetime.fromisoformat(value.isoformat())
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value


Moment = Annotated[datetime, BeforeValidator(_in_utc)]
User = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]
Scope = Literal["chat", "embeddings", "files", "admin"]


class KeyLimits(Part):
    """A key's own limits; what is left out is the spec's `access.limits`."""

    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent: Count | None = None
    budget: BudgetSpec | None = None


class KeyEntry(Part):
    """One key."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{4,64}$")]
    user: User
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: Moment | None = None
    expires: Moment | None = None
    revoked: Moment | None = None
    scopes: tuple[Scope, ...] = ("chat", "embeddings")
    limits: KeyLimits | None = None

    def live(self, now: datetime) -> bool:
        return self.revoked is None and (self.expires is None or self.expires > now)


class KeyFile(Part):
    """A whole key file."""

    format_version: Literal[1] = FORMAT_VERSION
    keys: tuple[KeyEntry, ...] = ()

    @field_validator("keys", mode="after")
    @classmethod
    def _consistent(cls, keys: tuple[KeyEntry, ...]) -> tuple[KeyEntry, ...]:
        twice = [name for name, count in Counter(key.id for key in keys).items() if count > 1]
        if twice:
            raise ValueError(f"id {twice[0]} is there twice")
        now = datetime.now(UTC)
        many = [name for name, count in Counter(key.user for key in keys if key.live(now)).items() if count > LIVE_KEYS]
        if many:
            raise ValueError(f"user {many[0]} has more than {LIVE_KEYS} live keys")
        return keys


def read_key_file(path: Path) -> KeyFile:
    """The keys in a file.

    Raises:
        InputError: it is not there, or not a key file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = (error.strerror or "cannot be read").lower() if isinstance(error, OSError) else "is not UTF-8 text"
        raise InputError(why, where=str(path), fix="make one with `tiger keys new`") from None
    try:
        raw = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)
        return KeyFile.model_validate(raw)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(_problem(error), where=str(path), fix="see docs/serving-keys.md") from None


def new_key(path: Path, user: str, *, expires: str | None, scopes: tuple[str, ...]) -> tuple[KeyEntry, str]:
    """Make a key, write its digest, and return its entry and its secret, which is nowhere else.

    Raises:
        InputError: the user has two live keys, or the expiry, a scope or the file is not right.
    """
    now = datetime.now(UTC).replace(microsecond=0)
    key_id = secrets.token_hex(6)
    secret = f"sk-tiger-{key_id}-{secrets.token_urlsafe(32)}"
    raw = {
        "id": key_id,
        "user": user,
        "sha256": hashlib.sha256(secret.encode()).hexdigest(),
        "created": now,
        "expires": _moment(expires, now) if expires else None,
        "scopes": scopes,
    }
    try:
        entry = KeyEntry.model_validate(raw)
    except ValidationError as error:
        raise InputError(_problem(error), where="tiger keys new", fix=f"scopes are {', '.join(SCOPES)}") from None
    with _changed(path) as keys:
        live = [key.id for key in keys if key.user == user and key.live(now)]
        if len(live) >= LIVE_KEYS:
            raise InputError(
                f"user {user} has {LIVE_KEYS} live keys already: {', '.join(live)}",
                where=str(path),
                fix=f"take one back first: tiger keys revoke {live[0]} --file {path}",
            )
        keys.append(entry)
    return entry, secret


def revoke_key(path: Path, key_id: str) -> KeyEntry:
    """Take a key back; its line stays, so that old audit lines can be read.

    Raises:
        InputError: there is no such key.
    """
    with _changed(path, there=True) as keys:
        places = [place for place, key in enumerate(keys) if key.id == key_id]
        if not places:
            raise InputError(f"has no key {key_id}", where=str(path), fix="`tiger keys list` shows them")
        entry = keys[places[0]]
        if entry.revoked is None:
            entry = entry.model_copy(update={"revoked": datetime.now(UTC).replace(microsecond=0)})
        keys[places[0]] = entry
    return entry


@contextmanager
def _changed(path: Path, *, there: bool = False) -> Iterator[list[KeyEntry]]:
    """The keys to change in place; written when the block ends well. Two commands at once wait for each other."""
    try:
        lock = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError((error.strerror or "").lower(), where=str(path.parent), fix="give another --file") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = list(read_key_file(path).keys) if there or path.exists() else []
        yield keys
        _write(path, KeyFile(keys=tuple(keys)))
    finally:
        os.close(lock)


def _write(path: Path, content: KeyFile) -> None:
    raw = content.model_dump(mode="json", exclude_none=True)
    text = json.dumps(raw, indent=1) if path.suffix == ".json" else yaml.safe_dump(raw, sort_keys=False)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _moment(text: str, now: datetime) -> datetime:
    span = re.fullmatch(r"(\d{1,6})([hdw])", text)
    try:
        if span:
            hours = {"h": 1, "d": 24, "w": 168}[span[2]]
            return now + timedelta(hours=hours * int(span[1]))
        moment = _in_utc(text)
    except (ValueError, OverflowError):
        raise InputError(f"got {text!r}", where="--expires", fix="e.g. 90d, 12h, 4w or 2027-01-31") from None
    if moment <= now:
        raise InputError(f"{text} has passed", where="--expires", fix="e.g. 90d")
    return moment


def _problem(error: Exception) -> str:
    """The first mistake as one clause, without the value: it may be a secret pasted into the wrong place."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "wants to be")
        return f"{field}: {message}" if field else message
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"is not YAML at line {error.problem_mark.line + 1}"
    return "is not a key file"

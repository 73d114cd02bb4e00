"""Messages as lines: the only place that knows the wire.

Nothing is pickled; a line that is too long, or is not a known message, ends the connection.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields

from tigerbot_jobs.train.recovery.messages import Form, Held, Message, ShardAt

LINE_LIMIT = 16 * 2**20  # an inventory of a thousand shards with their slices stays far below
_TYPES: dict[str, type] = {kind.__name__: kind for kind in Message.__args__}
_NESTED = {(Form.__name__, "shards"): ShardAt, (Held.__name__, "shards"): ShardAt}


def encode(message: Message) -> bytes:
    """One line."""
    about = asdict(message) | {"type": type(message).__name__}
    return json.dumps(about, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message in a line.

    Raises:
        ValueError: it is none.
    """
    raw = json.loads(line)
    if not isinstance(raw, dict) or raw.get("type") not in _TYPES:
        raise ValueError("not a message")
    name = raw.pop("type")
    kind = _TYPES[name]
    known = {one.name for one in fields(kind)}
    if set(raw) - known:
        raise ValueError(f"{name} has no {sorted(set(raw) - known)}")
    for key in raw:
        nested = _NESTED.get((name, key))
        if nested is not None:
            raw[key] = [nested(**item) for item in raw[key]]
    try:
        return kind(**raw)
    except TypeError as error:
        raise ValueError(str(error)) from None

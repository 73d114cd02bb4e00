"""Lines into a file that only its owner reads and that takes a bounded part of the disk."""

from __future__ import annotations

import os
from pathlib import Path


def append(path: Path, text: str, *, max_bytes: int, keep: int) -> None:
    """Append whole lines. A file that would grow beyond `max_bytes` becomes `.1`, its elders `.2` to `.keep`.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode("utf-8", "surrogateescape")
    if path.exists() and path.stat().st_size + len(data) > max_bytes:
        for number in range(keep, 0, -1):
            newer = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
            if newer.exists():
                os.replace(newer, path.with_name(f"{path.name}.{number}"))
    with open(path, "ab", opener=private) as file:
        file.write(data)


def private(path: str, flags: int) -> int:
    """An opener: mode 0600, not inherited by child processes."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)

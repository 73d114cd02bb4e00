"""Building beside: a file or folder is made next to its place, made durable, and renamed into it.

What a killed process left is known by its name (target, host, process) and removed by the next writer of that target.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from tigerbot.errors import StorageError

STAGED = ".staged-"


class MissingError(StorageError):
    """Nothing stands at this key."""


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A free path beside `target` to build it at; what is still there at the end is removed.

    What a killed process left of the same target is removed first: on a full disk there is no room for both.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{STAGED}{_globbed(target.name)}@*"):
        if writer_of(left) == "died":
            remove(left)
    path = target.with_name(f"{STAGED}{target.name}@{socket.gethostname()}@{os.getpid()}@{uuid.uuid4().hex[:8]}")
    try:
        yield path
    finally:
        remove(path)


def publish(stage: Path, target: Path) -> None:
    """Give a built file or folder its name, and make the name durable."""
    os.rename(stage, target)
    fsync(target.parent)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # another process may be sweeping the same leftovers
    else:
        path.unlink(missing_ok=True)


@contextmanager
def disk_errors(where: str | Path) -> Iterator[None]:
    """What the operating system says about a disk, as one `StorageError` line."""
    try:
        yield
    except FileNotFoundError as error:
        missing = error.filename or where
        raise MissingError("is not there", where=str(missing), fix="check the path") from None
    except OSError as error:
        if is_full(error):
            raise disk_full(where) from None
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise StorageError("holds other files", where=str(where), fix="give an empty or new folder") from None
        reason = error.strerror or str(error)
        raise StorageError(f"the disk says: {reason}", where=str(where), fix="check the path and its owner") from None


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk has no room; libraries written in Rust say it in words only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return os.strerror(errno.ENOSPC) in str(error)


def disk_full(where: str | Path) -> StorageError:
    return StorageError("the disk is full", where=str(where), fix="free space, or lower storage.keep")


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(path: str | Path) -> None:
    """Make a folder durable: every file and folder below it, then itself."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            fsync(Path(folder) / name)
        fsync(Path(folder))


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def writer_of(left: Path) -> Literal["lives", "died", "elsewhere"]:
    """What is known of the process that was building at a staged path."""
    _, host, pid, _ = left.name.rsplit("@", 3)
    if host != socket.gethostname():
        return "elsewhere"
    return "lives" if Path(f"/proc/{pid}").exists() else "died"


def _globbed(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)

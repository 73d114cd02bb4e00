"""A small disk that can be filled: a tmpfs of its own, never the host's."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

BALLAST = ".ballast"


@dataclass(frozen=True)
class Disk:
    """A mounted folder."""

    folder: Path

    @property
    def free_bytes(self) -> int:
        about = os.statvfs(self.folder)
        return about.f_bavail * about.f_frsize

    def fill(self, leave_bytes: int = 0) -> None:
        """Take the space until that much is left."""
        with (self.folder / BALLAST).open("ab") as ballast:
            try:
                while (more := self.free_bytes - leave_bytes) > 0:
                    ballast.write(bytes(min(more, 2**20)))
                    ballast.flush()
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def free(self) -> None:
        (self.folder / BALLAST).unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, size_mb: int = 64) -> Iterator[Disk]:
    """Mount a tmpfs on the folder. Skips the test without root.

    Nodes that are machines of their own see it when it was mounted before they started.
    """
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder.mkdir(parents=True, exist_ok=True)
    made = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tiger-chaos", str(folder)]
    done = subprocess.run(made, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield Disk(folder)
    finally:
        # Lazily: a process that is still writing must not keep the mount for ever.
        subprocess.run(["umount", "-l", str(folder)], check=True)

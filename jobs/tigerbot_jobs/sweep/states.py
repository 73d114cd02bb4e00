"""What trials kept to be resumed from: a file each, on the driver's disk, replaced as a whole.

A takeover is staged as a copy beside a member's own state and put in its place once the journal says so; a driver that
died in between finds the copy and puts it there.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class States:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> bytes | None:
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, state: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        staged = self._folder / f".{name}.{os.getpid()}"
        staged.write_bytes(state)
        staged.replace(self._path(name))

    def stage(self, source: str, name: str) -> bool:
        """Copy a member's state to be taken over; False where it has none."""
        if not self._path(source).exists():
            return False
        staged = self._folder / f".{name}.{os.getpid()}"
        shutil.copyfile(self._path(source), staged)
        staged.replace(self._staged(name))
        return True

    def take(self, name: str) -> None:
        """Put a staged state in place, if there is one."""
        if self._staged(name).exists():
            self._staged(name).replace(self._path(name))

    def forget(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.state"

    def _staged(self, name: str) -> Path:
        return self._folder / f"{name}.taken"

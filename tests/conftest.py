"""What tests of several rooms share."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk("3m")`: an empty file system of that size; called again, it is given another size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def sized(size: str) -> Path:
        again = "remount," if disk.is_mount() else ""
        words = ["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "tmpfs", str(disk)]
        mounted = subprocess.run(words, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"mount is refused here: {mounted.stderr.strip()}")
        return disk

    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield sized
    if disk.is_mount():
        subprocess.run(["umount", "-l", str(disk)], check=True)

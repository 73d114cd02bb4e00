"""`tiger --help` from a cold process: under half a second, because nothing heavy is imported before it is needed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import Row, rate


def main() -> list[Row]:
    tiger = Path(sys.executable).with_name("tiger")

    def once() -> float:
        began = time.perf_counter()
        subprocess.run([str(tiger), "--help"], check=True, capture_output=True)
        return time.perf_counter() - began

    once()
    return [rate("`tiger --help`, seconds", once, target="< 0.5", better="lower", rounds=9)]

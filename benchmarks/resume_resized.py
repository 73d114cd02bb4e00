"""Resume on two ranks from a checkpoint that one rank made, beside resume from one that two ranks made.

Timed from a built engine to the end of the first optimizer step, the slower rank counting.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.harness import Row, ratio
from benchmarks.ranks import on_ranks, on_two_ranks, results
from benchmarks.resume import keep_ours, resume_ours


def main() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        on_two_ranks(keep_ours, f"{folder}/two")
        on_ranks(1, keep_ours, f"{folder}/one")

        def resized() -> float:
            on_two_ranks(resume_ours, f"{folder}/one")
            return results(Path(folder) / "one/seconds")

        def same() -> float:
            on_two_ranks(resume_ours, f"{folder}/two")
            return results(Path(folder) / "two/seconds")

        row = ratio(
            "resume at another world size (seconds; ours = 1 -> 2 ranks, stock = our 2 -> 2)",
            resized,
            same,
            unit="s",
            target="<= 1.2",
            better="lower",
            pairs=10,
            note="`60m`, ZeRO-2, fp32, load + first step, folder on one disk; every byte read is verified",
        )
        return [row]

"""`python -m benchmarks [NAME ...]`: run benchmarks (all when none is named) and print their table."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from benchmarks.harness import Row, machine, save, table

NAMES = (
    "command_start",
    "token_reading",
    "simulator",
    "training_step",
    "training_recovery",
    "fault_a_minute",
    "goodput_predicted",
    "resume",
    "resume_resized",
    "snapshot_stall",
    "loss_memory",
    "adam8bit",
    "islands",
    "sweep_best",
    "engine_decode",
    "ensemble_decode",
    "skipping",
    "dial_quality",
    "gateway",
    "scale_up",
    "rollout",
    "sweep_rate",
    "sweep_kills",
    "heavy_start",
    "sweep_quality",
    "lr_transfer",
    "tracking_rate",
)


def main() -> None:
    names = sys.argv[1:] or NAMES
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"benchmarks: got {', '.join(unknown)}, wants some of {', '.join(NAMES)}", file=sys.stderr)
        raise SystemExit(2)
    rows: list[Row] = []
    for name in names:
        print(f"== {name}", flush=True)
        found = importlib.import_module(f"benchmarks.{name}").main()
        rows += found
        print(table(found), flush=True)
    save(rows, Path("benchmarks/last.json"))
    print(f"\n{machine()}\n\n{table(rows)}")


if __name__ == "__main__":
    main()

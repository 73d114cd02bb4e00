"""`metrics.jsonl`: what a run says about itself, one JSON line a step, written by the driver as rank 0 says it.

A resumed run writes the steps since its checkpoint again, so a reader lets the last line of a step win.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Row = dict[str, float]


def append_row(path: Path, row: Row) -> None:
    # NaN is not JSON: a value that is not finite is written as null.
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Rows by step, the last one of each."""
    if not path.exists():
        return []
    rows = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = _parsed(line)
        if row:
            rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def _parsed(line: str) -> Row | None:
    try:
        raw: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None  # cut off by a kill; the step is written again
    return {name: math.nan if value is None else value for name, value in raw.items()}

"""Targets for the sweep's tests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any


def bowl(params: Mapping[str, Any], report: Callable[[dict[str, float]], None]) -> None:
    """Lowest at lr = 1e-3 and 中 as the choice."""
    for step in range(1, 4):
        time.sleep(params.get("sleep_s", 0.0))
        distance = abs(math.log10(params["lr"]) + 3) + (0 if params["kind"] == "中" else 1)
        report({"loss": distance + 1 / step, "step": step})


def broken(params: Mapping[str, Any], report: Callable[[dict[str, float]], None]) -> None:
    raise ValueError("this target cannot work")

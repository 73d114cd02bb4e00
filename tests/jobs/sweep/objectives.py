"""Targets for the sweep's tests."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def bowl(params: Mapping[str, Any], report: Callable[[dict[str, float]], None]) -> None:
    """Lowest at lr = 1e-3 and 中 as the choice."""
    for step in range(1, 4):
        time.sleep(params.get("sleep_s", 0.0))
        distance = abs(math.log10(params["lr"]) + 3) + (0 if params["kind"] == "中" else 1)
        report({"loss": distance + 1 / step, "step": step})


def broken(params: Mapping[str, Any], report: Callable[[dict[str, float]], None]) -> None:
    raise ValueError("this target cannot work")


def walk(params: Mapping[str, Any], report: Any) -> None:
    """Counts to `steps` from where it was, keeping its place; `fail` says what goes wrong at step 3."""
    step = int(report.kept or 0)
    while step < params.get("steps", 6):
        step += 1
        time.sleep(params.get("sleep_s", 0.0))
        if step == 3 and (fail := params.get("fail")):
            misbehave(fail, params, report)
        report({"loss": abs(params["x"]) + 1 / step, "place": step, "step": step})
        report.keep(str(step).encode())


def misbehave(fail: str, params: Mapping[str, Any], report: Any) -> None:
    marker = Path(params["folder"]) / f"{fail}-{report.name}"
    again = marker.exists()
    marker.touch()
    if fail == "nan":
        report({"loss": math.nan, "step": 3})
    elif fail == "backwards":
        report({"loss": 9.0, "step": 1})
    elif fail == "for ever":
        time.sleep(3600)
    elif fail == "prints":
        for _ in range(100):
            print("x" * 1_000_000)
    elif fail == "memory" and params["micro_batch"] > 2:
        raise RuntimeError("CUDA error: out of memory")
    elif fail == "dies once" and not again:
        os.kill(os.getpid(), signal.SIGKILL)
    elif fail == "dies":
        os._exit(3)
    elif fail == "bug":
        raise KeyError("width")


def silent(params: Mapping[str, Any], report: Any) -> None:
    report({"acuracy": 1.0, "size": 3})


def member(params: Mapping[str, Any], report: Any) -> None:
    """A member of a population: `x` moves its place, which is what is copied."""
    step, place = json.loads(report.kept or b"[0, 0.0]")
    while step < 12:
        step, place = step + 1, place + params["x"]
        report({"loss": -place, "step": step})
        report.keep(json.dumps([step, place]).encode())

"""Runs of this machine that a living process works on: what they are at, and how they are stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tigerbot.errors import InputError, TigerError
from tigerbot.runs import holder, read_json

ENDPOINT = "endpoint.json"  # a deployed ensemble's address, while it is up
STOP_DEADLINE_S = 120.0
_DEPTH = ("*/spec.json", "*/*/spec.json")  # runs, and runs of a demo


@dataclass(frozen=True)
class Living:
    """A run that is being worked on by process `pid`."""

    name: str
    kind: str
    folder: Path
    pid: int
    since: float

    def line(self) -> str:
        """Name, kind, age, and what it is at."""
        seconds = max(0.0, time.time() - self.since)
        return f"{self.name:<24} {self.kind:<7} {_age(seconds):>8}  {_at(self)}"


def living(folder: Path) -> list[Living]:
    """The runs below a storage folder that are being worked on, by name."""
    found = []
    for spec in sorted(path for depth in _DEPTH for path in folder.glob(depth)):
        pid = holder(spec.parent)
        if pid is not None:
            about, state = read_json(spec, {}), read_json(spec.parent / "state.json", {})
            kind = about.get("spec", {}).get("kind", "?")
            found.append(Living(spec.parent.name, kind, spec.parent, pid, state.get("began", spec.stat().st_mtime)))
    return found


def stop_run(run: Living, deadline_s: float = STOP_DEADLINE_S) -> None:
    """Ask its process to stop, as Ctrl-C does, and wait until the run is let go of.

    Raises:
        InputError: it belongs to another user or to another machine.
        TigerError: it did not stop in time.
    """
    if not run.pid:
        raise InputError("no process of this machine works on it", where=str(run.folder), fix="press Ctrl-C there")
    try:
        with contextlib.suppress(ProcessLookupError):
            os.kill(run.pid, signal.SIGTERM)
    except PermissionError:
        raise InputError(f"process {run.pid} is another user's", where=str(run.folder), fix="ask them") from None
    until = time.monotonic() + deadline_s
    while holder(run.folder) is not None:
        if time.monotonic() > until:
            raise TigerError(
                f"process {run.pid} did not stop in {deadline_s:.0f} s", where=str(run.folder), fix=f"kill -9 {run.pid}"
            )
        time.sleep(0.2)


def _at(run: Living) -> str:
    endpoint = read_json(run.folder / ENDPOINT, {})
    if "url" in endpoint:
        note = f", {endpoint['note']}" if endpoint.get("note") else ""
        return f"{endpoint['url']} {_health(endpoint['url'])}{note}"
    row = _last_row(run.folder / "metrics.jsonl")
    if row:
        numbers = {"tokens": ",.0f", "loss": ".3f", "tokens_per_second": ",.0f"}
        shown = [
            f"{name} {row[name]:{form}}" for name, form in numbers.items() if isinstance(row.get(name), float | int)
        ]
        return ", ".join([f"step {row['step']:.0f}", *shown])
    return "working"


def _health(address: str) -> str:
    import httpx

    try:
        return "answers" if httpx.get(f"{address}/healthz", timeout=2.0).is_success else "is not healthy"
    except httpx.HTTPError:
        return "does not answer"


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole line of a file of JSON lines."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}


def _age(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}h{rest // 60:02d}m" if hours else f"{rest // 60}m{rest % 60:02d}s"

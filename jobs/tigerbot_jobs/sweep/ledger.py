"""What became of every trial, in an append-only file: the sweep's own memory, which outlives its driver.

A trial is known by its name. One that ended stays ended; one that had begun when the driver died is begun again under
its name, with its parameters, before any new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tigerbot.outbox import Outbox

Status = Literal["running", "done", "failed"]


@dataclass
class Entry:
    """One trial. `metric` is its last report; `error` its first line where it failed."""

    name: str
    params: dict[str, Any]
    status: Status = "running"
    metric: float | None = None
    error: str = ""


class Ledger:
    """The trials of one sweep; written by its driver."""

    def __init__(self, path: Path) -> None:
        self._outbox = Outbox(path)
        self.entries: dict[str, Entry] = {}
        for record in self._outbox.records():
            self._apply(record)

    @property
    def ended(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.status != "running"]

    @property
    def cut_short(self) -> list[Entry]:
        return [entry for entry in self.entries.values() if entry.status == "running"]

    def begin(self, params: Mapping[str, Any]) -> Entry:
        """The entry of a trial that starts: the one that was cut short with these parameters, or a new one."""
        wanted = _canonical(params)
        for entry in self.cut_short:
            if _canonical(entry.params) == wanted:
                return entry
        record = {"event": "begin", "name": f"trial-{len(self.entries):04d}", "params": dict(params)}
        self._say(record)
        return self.entries[record["name"]]

    def end(self, name: str, *, metric: float | None, error: str = "") -> None:
        status = "failed" if error or metric is None else "done"
        self._say({"event": "end", "name": name, "status": status, "metric": metric, "error": error})

    def close(self) -> None:
        self._outbox.close()

    def _say(self, record: dict[str, Any]) -> None:
        self._outbox.append(record)
        self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        if record["event"] == "begin":
            self.entries[record["name"]] = Entry(record["name"], record["params"])
            return
        entry = self.entries[record["name"]]
        entry.status, entry.metric, entry.error = record["status"], record["metric"], record["error"]


def _canonical(params: Mapping[str, Any]) -> str:
    return json.dumps(dict(params), sort_keys=True, ensure_ascii=False)

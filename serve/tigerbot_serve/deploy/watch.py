"""The canary as whoever keeps the endpoint sees it: every replica's numbers together, one decision, written down."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any, Protocol

from tigerbot.runs import write_json
from tigerbot_serve.deploy.replica import Version
from tigerbot_serve.scale.verdict import Tally, quantile, together, worse

EVERY_S = 5.0
FILE = "canary.json"  # in the run's folder: the numbers and what was decided by them


class Watched(Protocol):
    """What is needed of an endpoint."""

    version: Version

    def ask_replicas(self, method: str, *args: Any) -> list[Any]: ...


class CanaryWatch:
    """Looks every few seconds.

    Attributes:
        note: what `tiger status` says; "" without a canary.
    """

    def __init__(self, endpoint: Watched, folder: Path, every_s: float = EVERY_S) -> None:
        self._endpoint, self._folder, self._every_s = endpoint, folder, every_s
        self._next, self._version = 0.0, ""
        self._why: str | None = None
        self.note = ""

    def look(self) -> str | None:
        """Gather, decide, tell the replicas; returns a line when the canary is taken back."""
        version = self._endpoint.version
        if version.id != self._version:
            self._version, self._why, self.note = version.id, None, ""
        spec = version.spec.canary
        if spec is None or time.monotonic() < self._next:
            return None
        self._next = time.monotonic() + self._every_s
        reports = [report for report in self._endpoint.ask_replicas("canary") if report]
        canary, rest = (together(_tally(report[side]) for report in reports) for side in ("canary", "rest"))
        before = self._why
        self._why = (
            before
            or next((report["taken_back"] for report in reports if report["taken_back"]), None)
            or worse(canary, rest, min_answers=spec.min_answers, slower=spec.slower)
        )
        # A replica that came after the decision has not heard of it.
        if self._why and any(not report["taken_back"] for report in reports):
            self._endpoint.ask_replicas("take_back_canary", self._why)
        self.note = f"canary {spec.percent:g}%: " + (
            f"taken back ({self._why})" if self._why else f"{canary.answers} answers, {canary.errors} errors"
        )
        write_json(
            self._folder / FILE,
            {
                "version": version.id,
                "taken_back": self._why,
                "at": time.time(),
                "canary": _shown(canary),
                "rest": _shown(rest),
            },
        )
        return f"the canary is taken back: {self._why}" if self._why and not before else None


def _tally(report: dict[str, Any]) -> Tally:
    return Tally(report["answers"], report["errors"], deque(report["times"]))


def _shown(tally: Tally) -> dict[str, Any]:
    p99 = quantile(tally.times, 0.99) if tally.times else None
    return {"answers": tally.answers, "errors": tally.errors, "p99_s_per_token": p99}

"""Ranks that look slow, and the second sign: every member times the same piece of work, and that decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tigerbot_jobs.train.watch.stragglers import SlowRanks, confirm


@dataclass(frozen=True)
class Finding:
    """What the second sign says of a suspect."""

    worker: str
    confirmed: bool
    evidence: str


class Suspects:
    """One generation's after the other."""

    def __init__(self) -> None:
        self._slow = SlowRanks()
        self._members: Sequence[str] = ()
        self._accused: dict[str, str] = {}  # by their own times, until a probe says more
        self._settled: set[str] = set()  # slow for certain: said once
        self._probes: dict[str, float] = {}

    def new_generation(self, members: Sequence[str]) -> None:
        self._slow.new_generation(members)
        self._members, self._accused, self._settled, self._probes = members, {}, set(), {}

    def add(self, worker: str, own_s: float) -> None:
        """A worker's seconds outside of collectives in one step."""
        self._slow.add(worker, own_s)

    def check(self) -> bool:
        """Whether somebody new looks slow, so that every member is to be probed."""
        found = [mark for mark in self._slow.check() if mark.signal != "individual"]
        new = [mark for mark in found if mark.worker not in self._settled and mark.worker not in self._accused]
        if not new:
            return False
        self._accused |= {mark.worker: mark.evidence for mark in new}
        self._probes = {}
        return True

    def probed(self, worker: str, seconds: float) -> list[Finding]:
        """A member's time for the piece of work; what follows when all have answered."""
        self._probes[worker] = seconds
        if not self._accused or len(self._probes) < len(self._members):
            return []
        judged = [(confirm(worker, self._probes), evidence) for worker, evidence in self._accused.items()]
        self._settled |= {one.worker for one, _ in judged if one.confirmed}
        self._accused, self._probes = {}, {}
        return [Finding(one.worker, one.confirmed, f"{evidence}; {one.evidence}") for one, evidence in judged]

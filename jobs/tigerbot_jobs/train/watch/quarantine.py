"""Nodes that fail again and again, and for how long nothing is placed on them.

A file beside the runs, so that it outlives every job and all jobs of a storage folder share it: faults by node and
time, and who is kept out until when. Two hardware-like faults in a day, or one of a kind that never heals, take a node
out; soft faults, which a process restart cures three times in four, count less every hour. A person can see all of it,
clear a node and take one out.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tigerbot.errors import InputError
from tigerbot.runs import read_json, write_json

FILE = "nodes.json"
HARDWARE = frozenset({"node", "corruption", "straggler"})
NEVER_HEALS = frozenset({"memory_error", "device_lost", "bus_lost"})
SOFT = frozenset({"process", "hang", "partition"})  # others (a NaN, an exception, a preemption) say nothing of a node

HOUR_S = 3600.0
HARDWARE_FAULTS, HARDWARE_WINDOW_S, HARDWARE_OUT_S = 2, 24 * HOUR_S, 24 * HOUR_S
SOFT_FAULTS, SOFT_HALF_LIFE_S, SOFT_OUT_S = 3.0, 6 * HOUR_S, 6 * HOUR_S
INCIDENT_S = 60.0  # every worker of a lost node reports it: one incident
_ROUNDING = 0.2  # three soft faults within the hour are three, though the first has decayed a little
_KEPT_S = 30 * 24 * HOUR_S


@dataclass(frozen=True)
class NodeFault:
    """A fault that a node is suspected of."""

    node: str
    kind: str
    at: float
    evidence: str = ""


@dataclass(frozen=True)
class Quarantined:
    """A node that nothing is placed on; `until` is None when only a person can end it."""

    node: str
    since: float
    until: float | None
    evidence: str

    def line(self) -> str:
        """As a person reads it."""
        return f"{self.node} is kept out {_until(self.until)}: {self.evidence}"


class Quarantine:
    """The list of a storage folder.

    Args:
        path: the JSON file; it and its folder are made when something is written.
        clock: wall seconds, comparable between machines.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock

    def add(self, node: str, kind: str, evidence: str = "") -> Quarantined | None:
        """Note a fault of a node; what it is now kept out for, if this fault did it."""
        now = self._clock()
        with self._changing() as book:
            book.faults = [fault for fault in book.faults if fault.at > now - _KEPT_S]
            book.faults.append(NodeFault(node, kind, now, evidence))
            since = book.cleared.get(node, 0.0)
            sentence = _sentence([fault for fault in book.faults if fault.node == node and fault.at >= since], now)
            if sentence is None:
                return None
            book.keep_out(sentence)
            return sentence

    def hold(self, node: str, hours: float, reason: str = "by hand") -> Quarantined:
        """Keep a node out for so long, because a person says so.

        Raises:
            InputError: no time at all.
        """
        if not 0 < hours < math.inf:
            raise InputError(f"{hours:g} hours are none", where="--hours", fix="give a number above 0")
        now = self._clock()
        sentence = Quarantined(node, now, now + hours * HOUR_S, reason)
        with self._changing() as book:
            book.out[node] = sentence
        return sentence

    def clear(self, node: str) -> bool:
        """Let a node in again; the faults before count no more. Whether it was out."""
        now = self._clock()
        with self._changing() as book:
            sentence = book.out.pop(node, None)
            book.cleared[node] = now
            return sentence is not None and _holds(sentence, now)

    def active(self, now: float | None = None) -> dict[str, Quarantined]:
        """Who is kept out, by node."""
        at = self._clock() if now is None else now
        return {node: one for node, one in self._read().out.items() if _holds(one, at)}

    def history(self) -> list[NodeFault]:
        """Faults of the last 30 days, oldest first."""
        return self._read().faults

    @contextmanager
    def _changing(self) -> Iterator[_Book]:
        """The list, for one writer at a time on this machine; written whole when it was changed."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_name(f".{self._path.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            book = self._read()
            yield book
            write_json(self._path, book.to_json())

    def _read(self) -> _Book:
        """A file that is missing or spoilt is an empty list: no job stops for it."""
        return _Book.from_json(read_json(self._path, {}))


def quarantine_of(folder: Path) -> Quarantine:
    """The list that the runs of a storage folder share."""
    return Quarantine(folder / FILE)


def node_lines(quarantine: Quarantine) -> list[str]:
    """Who is kept out and until when, then every node's faults, newest first."""
    lines = [one.line() for one in sorted(quarantine.active().values(), key=lambda one: one.node)]
    for fault in reversed(quarantine.history()):
        lines.append(f"{_date(fault.at)}  {fault.node}  {fault.kind}  {fault.evidence}".rstrip())
    return lines


@dataclass
class _Book:
    faults: list[NodeFault]
    out: dict[str, Quarantined]
    cleared: dict[str, float]

    def keep_out(self, sentence: Quarantined) -> None:
        """A longer time stands."""
        old = self.out.get(sentence.node)
        if old is not None and (old.until is None or (sentence.until is not None and old.until > sentence.until)):
            sentence = replace(sentence, until=old.until)
        self.out[sentence.node] = sentence

    def to_json(self) -> dict:
        return {
            "faults": [asdict(fault) for fault in self.faults],
            "out": [asdict(one) for one in self.out.values()],
            "cleared": self.cleared,
        }

    @classmethod
    def from_json(cls, raw: dict) -> _Book:
        out = [Quarantined(**one) for one in raw.get("out", [])]
        faults = [NodeFault(**fault) for fault in raw.get("faults", [])]
        return cls(faults, {one.node: one for one in out}, raw.get("cleared", {}))


def _sentence(faults: list[NodeFault], now: float) -> Quarantined | None:
    """What the last fault of a node, with those before it, means for the node."""
    last = faults[-1]
    if last.kind in NEVER_HEALS:
        return Quarantined(last.node, now, None, f"{last.kind}, which does not heal")
    hardware = _incidents([fault for fault in faults if fault.kind in HARDWARE and fault.at > now - HARDWARE_WINDOW_S])
    if last.kind in HARDWARE and len(hardware) >= HARDWARE_FAULTS:
        kinds = ", ".join(fault.kind for fault in hardware)
        return Quarantined(last.node, now, now + HARDWARE_OUT_S, f"{len(hardware)} hardware faults in 24 h ({kinds})")
    soft = _incidents([fault for fault in faults if fault.kind in SOFT])
    weight = sum(0.5 ** ((now - fault.at) / SOFT_HALF_LIFE_S) for fault in soft)
    if last.kind in SOFT and weight >= SOFT_FAULTS - _ROUNDING:
        recent = [fault.kind for fault in soft if fault.at > now - SOFT_HALF_LIFE_S]
        text = f"{len(recent)} soft faults in {SOFT_HALF_LIFE_S / HOUR_S:g} h ({', '.join(recent)})"
        return Quarantined(last.node, now, now + SOFT_OUT_S, text)
    return None


def _incidents(faults: list[NodeFault]) -> list[NodeFault]:
    """The first fault of each incident."""
    first: list[NodeFault] = []
    for fault in faults:
        if not first or fault.at - first[-1].at > INCIDENT_S:
            first.append(fault)
    return first


def _holds(sentence: Quarantined, now: float) -> bool:
    return sentence.until is None or now < sentence.until


def _until(until: float | None) -> str:
    return "until it is cleared" if until is None else f"until {_date(until)}"


def _date(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))

"""From a journal (`trials.jsonl`, one event a line, written by whichever driver was alive) to a history.

Points of learning curves are set aside unread, so the 100 best of 3,000 trials are known before the points would have
been parsed. What is not JSON, names no trial or has another shape is counted in `History.unreadable` and left out.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tigerbot.errors import InputError
from tigerbot_jobs.sweep.analysis import MISSHAPEN, POINT, Ending, Exploit, History, Life, Rung, Trial, parsed


def read_history(path: Path) -> History:
    """The history in a journal, also while a driver writes it: half a last line is not there yet.

    Raises:
        InputError: the file cannot be read.
    """
    with _all_is_kept():
        data = _read(path)
        events, unreadable = parsed(_others(data))
        fold = _Fold()
        for event in events:
            try:
                fold.take(event)
            except MISSHAPEN:
                unreadable += 1
        return fold.history(unreadable, data)


def read_events(path: Path) -> list[Any]:
    """The events in a journal that are no points, in order, as they are written.

    Raises:
        InputError: the file cannot be read.
    """
    return parsed(_others(_read(path)))[0]


@contextmanager
def _all_is_kept() -> Iterator[None]:
    """Garbage is not looked for: there is none, and a look through all that a process holds takes as long as the rest."""
    looked = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looked:
            gc.enable()


class _Fold:
    """Events, one after the other, to a history."""

    def __init__(self) -> None:
        self._lives: list[Life] = []
        self._begins: dict[str, list[Mapping[str, Any]]] = {}
        self._endings: dict[str, list[Ending]] = {}
        self._running: dict[str, bool] = {}
        self._rungs: dict[tuple[str, int], Rung] = {}
        self._exploits: dict[tuple[str, int], Exploit] = {}

    def take(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "open":
            self._lives.append(_life(event))
        elif kind == "begin":
            name, _ = str(event["name"]), float(event["t"])
            self._begins.setdefault(name, []).append(event)
            self._running[name] = True
        elif kind == "end":
            self._end(event)
        elif kind == "rung":
            place = event["name"], int(event["rung"])
            earlier = self._rungs.get(place)
            promoted = bool(event["promoted"]) or (earlier is not None and earlier.promoted)
            value = earlier.value if earlier else _number(event["value"])
            self._rungs[place] = Rung(*place, int(event["step"]), value, promoted)
        elif kind == "exploit":
            step = int(event["step"])
            self._exploits.setdefault(
                (event["name"], step), Exploit(event["name"], event["from"], step, event["before"], event["after"])
            )

    def history(self, unreadable: int, journal: bytes) -> History:
        changed = {exploit.name: exploit.after for exploit in self._exploits.values()}
        trials = {}
        for name, begins in self._begins.items():
            first, last = begins[0], begins[-1]
            config, seed = str(first.get("config") or name), int(first.get("seed") or 0)
            trials[name] = Trial(
                name=name,
                params=changed.get(name) or first.get("params") or {},
                config=config,
                seed=seed,
                parent=last.get("parent"),
                cards=float(last.get("cards") or 0),
                node=str(last.get("node") or ""),
                begun=tuple(float(begin["t"]) for begin in begins),
                reasons=("", *(str(b.get("after") or ("takeover" if b.get("parent") else "")) for b in begins[1:])),
                endings=tuple(self._endings.get(name, ())),
                fresh=bool(first.get("fresh")),
                running=self._running[name],
            )
        return History(
            tuple(self._lives), trials, tuple(self._rungs.values()), tuple(self._exploits.values()), unreadable, journal
        )

    def _end(self, event: Mapping[str, Any]) -> None:
        name, metric = event["name"], event.get("metric")
        if name not in self._begins:
            raise ValueError(f"{name} ended and never began")
        ending = Ending(
            t=float(event["t"]),
            status=str(event["status"]),
            metric=None if metric is None else float(metric),
            error=str(event.get("error") or ""),
            cause=str(event.get("cause") or ""),
            seconds=float(event.get("seconds") or 0),
        )
        self._endings.setdefault(name, []).append(ending)
        self._running[name] = False


def _life(event: Mapping[str, Any]) -> Life:
    price = event.get("price_per_card_hour")
    return Life(
        t=float(event["t"]),
        driver=str(event.get("driver") or ""),
        planned=int(event.get("trials") or 0),
        metric=str(event["metric"]),
        mode="max" if event["mode"] == "max" else "min",
        searcher=str(event.get("searcher") or ""),
        scheduler=str(event.get("scheduler") or ""),
        price_per_card_hour=None if price is None else float(price),
    )


def _read(path: Path) -> bytes:
    """Whole lines."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot be read ({str(error.strerror).lower()})", where=str(path), fix="give a sweep or its trials.jsonl"
        ) from None
    return data[: data.rfind(b"\n") + 1]


def _others(data: bytes) -> list[bytes]:
    """The lines that are no points. Nine of ten are: no object is made of those."""
    characters = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(characters == ord("\n"))
    starts = np.concatenate(([0], ends[:-1] + 1)) if len(ends) else ends
    other = np.zeros(len(starts), bool)
    for place, character in enumerate(POINT):
        other |= characters.take(starts + place, mode="clip") != character
    return [data[start:end] for start, end in zip(starts[other].tolist(), ends[other].tolist(), strict=True)]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)

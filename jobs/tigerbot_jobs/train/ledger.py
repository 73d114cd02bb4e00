"""`ledger.jsonl`: everything that happened to a training run, one JSON object a line, appended and never changed.

The driver writes it, whoever wants reads it, also while it grows. A life of the driver is eight hex digits that stand in
every line: a driver that was killed writes no `stopped`, its successor goes on in the same file. Durations come from the
driver's monotonic clock `m`; its wall clock `t` joins two lives. docs/goodput.md has the table of kinds. This module
knows nothing about what the events mean.

Training comes before bookkeeping: nothing here raises for a disk that is full or a folder that is gone, and nothing waits
for a disk to have synchronised.
"""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tigerbot.errors import InputError

FORMAT_VERSION = 1
_LATEST_S = 1e11  # no clock says more: the year 5138
_CLOSE_TIMEOUT_S = 5.0  # a network disk that hangs must not hold the driver's end


@dataclass(frozen=True)
class Clock:
    """Two clocks of one host, in seconds: one that people read, one that never jumps."""

    wall: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic


class Ledger:
    """Appends events; from any thread, while other processes read.

    Every line is with the kernel when `write` returns, so it outlives this process. A thread of its own has the disk
    synchronised after everything but `steps`, so that the rest outlives the machine too.

    Args:
        path: the file; it and its folder are made where missing. A last line that a kill cut off is closed.
        clock: replaced in tests.
        driver: this life's name; a fresh one unless given.
    """

    def __init__(self, path: str | Path, *, clock: Clock | None = None, driver: str = "") -> None:
        self.path = Path(path)
        self.driver = driver or secrets.token_hex(4)
        self.errors = 0
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._file: int | None = None
        self._torn = False  # the file ends in the middle of a line
        self._missing = 0  # lines that could not be written since the last one that could
        self._closing = False
        self._unsynced = threading.Event()
        with self._lock:
            self._attempt(b"")
        self._syncer = threading.Thread(target=self._sync, daemon=True, name="ledger")
        self._syncer.start()

    def write(self, kind: str, **fields: Any) -> None:
        """Append one event. Values that are not finite become null."""
        with self._lock:
            if not self._attempt(self._line(kind, fields)):
                self._missing += 1
            elif self._missing:
                missing, self._missing = self._missing, 0
                self._attempt(self._line("gap", {"lines": missing}))
        if kind != "steps":
            self._unsynced.set()

    def close(self) -> None:
        """Have everything synchronised, within seconds, and close the file. Later writes are counted as errors."""
        self._closing = True
        self._unsynced.set()
        self._syncer.join(timeout=_CLOSE_TIMEOUT_S)
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, kind: str, fields: dict[str, Any]) -> bytes:
        common = {"t": round(self._clock.wall(), 6), "m": round(self._clock.monotonic(), 6), "driver": self.driver}
        event = fields | common | {"kind": kind}
        try:
            text = json.dumps(event, ensure_ascii=False, allow_nan=False, default=str)
        except ValueError:
            text = json.dumps(_finite(event), ensure_ascii=False, default=str)
        return text.encode("utf-8", "backslashreplace") + b"\n"

    def _attempt(self, line: bytes) -> bool:
        """Open the file where it is not, and append; whether that worked."""
        try:
            if self._file is None:
                self._file = self._opened()
            if line:
                self._append(self._file, line)
        except OSError as error:
            if self.errors == 0:
                print(f"  {self.path}: {error.strerror}; training goes on without this record", file=sys.stderr)
            self.errors += 1
            return False
        return True

    def _opened(self) -> int:
        if self._closing:
            raise OSError(errno.EBADF, "the ledger is closed")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(file).st_size
            self._torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
            if not _is_first(os.pread(file, 4096, 0).partition(b"\n")[0]):
                self._append(file, self._line("ledger", {"format_version": FORMAT_VERSION}))
        except OSError:
            os.close(file)
            raise
        return file

    def _append(self, file: int, line: bytes) -> None:
        # In one call, so that lines of two writers never mix.
        whole = b"\n" + line if self._torn else line
        written = os.write(file, whole)
        if written:
            self._torn = written < len(whole)
        if written < len(whole):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _sync(self) -> None:
        closing = False
        while not closing:
            self._unsynced.wait()
            self._unsynced.clear()
            closing, file = self._closing, self._file  # looked at first: what was written before is synchronised
            try:
                if file is not None:
                    os.fsync(file)
            except OSError:
                self.errors += 1  # the next write says it, where it concerns more than this call


@dataclass(frozen=True)
class Event:
    """One line. Fields that are missing or of another type read as their default: a ledger may be of another age."""

    t: float
    m: float
    driver: str
    kind: str
    fields: dict[str, Any]

    def number(self, name: str, default: float = 0.0) -> float:
        value = finite(self.fields.get(name))
        return default if value is None else value

    def whole(self, name: str, default: int = 0) -> int:
        return int(self.number(name, default))

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        return "" if value is None else str(value)

    def items(self, name: str) -> list[Any]:
        value = self.fields.get(name)
        return value if isinstance(value, list) else []


def read_events(path: str | Path) -> list[Event]:
    """The events of a ledger in the order they were written, without lines that are cut off or not understood.

    Raises:
        InputError: there is no such file, or a newer version of this software began it.
    """
    return Tail(path).read()


class Tail:
    """Reads on where it stopped, for whoever follows a ledger that grows."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offset = 0

    def read(self) -> list[Event]:
        """The events since the last call. A last line without an end is left for the next one."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                written, _, _ = file.read().rpartition(b"\n")
        except OSError as error:
            raise InputError(f"{error.strerror}".lower(), where=str(self.path), fix="give a run or a ledger") from None
        if not written:
            return []
        self._offset += len(written) + 1
        return list(self._understood(written.split(b"\n")))

    def _understood(self, lines: Iterable[bytes]) -> Iterable[Event]:
        for line in lines:
            event = _parsed(line)
            if event is None:
                continue
            if event.kind == "ledger" and event.whole("format_version", 1) > FORMAT_VERSION:
                raise InputError(
                    f"is a ledger of format {event.whole('format_version')}, this software reads {FORMAT_VERSION}",
                    where=str(self.path),
                    fix="read it with the newer version that wrote it",
                )
            yield event


def finite(value: Any) -> float | None:
    """A number that can be counted with, or None for whatever else JSON may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _parsed(line: bytes) -> Event | None:
    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict):
        return None
    t, m = finite(raw.pop("t", None)), finite(raw.pop("m", None))
    driver, kind = raw.pop("driver", None), raw.pop("kind", None)
    if (
        t is None
        or m is None
        or max(abs(t), abs(m)) > _LATEST_S
        or not isinstance(driver, str)
        or not isinstance(kind, str)
    ):
        return None
    return Event(t, m, driver, kind, raw)


def _is_first(line: bytes) -> bool:
    event = _parsed(line)
    return event is not None and event.kind == "ledger"


def _finite(value: Any) -> Any:
    """The same value with null for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value

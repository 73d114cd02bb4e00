"""What a stage shows while it works: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stage:
    """One stage in progress. `total` is in `unit`; 0 when unknown."""

    title: str
    total: float
    unit: str
    _bar: Any = None
    _task: Any = None
    _done: float = 0.0
    _first: tuple[float, float] | None = None  # what was done when this was first said, and when
    _began: float = field(default_factory=lambda: time.monotonic())
    _said: float = field(default_factory=lambda: time.monotonic())

    def update(self, done: float, note: str = "") -> None:
        """`done` of `total` so far, with a short note (loss, rate)."""
        self._done = done
        if self._first is None:
            # A stage that goes on begins in its middle: what an earlier process did says nothing of our pace.
            self._first = (done, time.monotonic())
            if self._bar is not None:
                self._bar.reset(self._task, completed=done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif time.monotonic() - self._said >= 10:
            self._said = time.monotonic()
            print(f"  {self.title}: {self._fraction()}{self._left()} {note}".rstrip(), flush=True)

    def advance(self, amount: float = 1.0, note: str = "") -> None:
        self.update(self._done + amount, note)

    def _fraction(self) -> str:
        return f"{self._done:,.0f}/{self.total:,.0f} {self.unit}" if self.total else f"{self._done:,.0f} {self.unit}"

    def _left(self) -> str:
        if not self.total or self._first is None or self._done <= self._first[0]:
            return ""
        begun, since = self._first
        pace = (time.monotonic() - since) / (self._done - begun)
        return f", {pace * (self.total - self._done):.0f} s left"


@contextmanager
def stage(title: str, *, total: float = 0, unit: str = "") -> Iterator[Stage]:
    """Show a stage while its body runs; say how long it took."""
    shown = Stage(title, total, unit)
    print(f"> {title}", flush=True)
    if sys.stdout.isatty():
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = ("  {task.percentage:>3.0f}%", BarColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[note]}"), transient=True) as bar:
            shown._bar = bar
            shown._task = bar.add_task(title, total=total or None, note="")
            yield shown
    else:
        yield shown
    print(f"  done in {time.monotonic() - shown._began:.1f} s", flush=True)

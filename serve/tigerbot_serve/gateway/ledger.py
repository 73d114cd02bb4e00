"""What keys have spent of their budgets in this day or month. It outlives the process.

Amounts are integers: tokens, or millionths of the money unit. The file is written whole and atomically. It says at least
what was spent: what is promised to requests under way is written down before they begin, and what they did not use is taken
out again within a second of their end. So a process that is killed has spent too much in it, never too little.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tigerbot.errors import first_line
from tigerbot.runs import write_text
from tigerbot.spec.access import BudgetSpec, Period, PriceSpec

log = logging.getLogger(__name__)

WRITE_EVERY_S = 1.0
MONEY_UNIT = 1_000_000
SPARE_PARTS = 1000  # of a budget: a part that is promised to nobody yet, so that few requests wait for the file


@dataclass(frozen=True)
class Tokens:
    """Tokens of a request, as they are priced."""

    prompt: int = 0
    completion: int = 0
    draft: int = 0
    judge: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.completion + self.draft + self.judge


def cost(tokens: Tokens, budget: BudgetSpec | None, price: PriceSpec) -> int:
    """What tokens take out of a budget, rounded up; 0 where there is none."""
    if budget is None:
        return 0
    if budget.tokens is not None:
        return tokens.total
    read, written = tokens.prompt + tokens.judge, tokens.completion + tokens.draft
    return -int(-(read * price.prompt + written * price.completion) * MONEY_UNIT // 1000)


def allowance(budget: BudgetSpec) -> int:
    """The whole of a budget."""
    return budget.tokens if budget.tokens is not None else int((budget.money or 0) * MONEY_UNIT)


def period_of(now: float, per: Period) -> str:
    """The name of the period, e.g. `2026-11`; it sorts by time."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d" if per == "day" else "%Y-%m")


def period_left_s(now: float, per: Period) -> float:
    """Seconds until the next period begins."""
    moment = datetime.fromtimestamp(now, UTC)
    midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    if per == "day":
        following = midnight + timedelta(days=1)
    else:
        following = (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
    return (following - moment).total_seconds()


@dataclass(frozen=True)
class _Row:
    """A key's spending in one period; `promised` may still be spent without another write, and `spare` on top of it."""

    period: str
    spent: int = 0
    promised: int = 0
    spare: int = 0


class Ledger:
    """Spending by key and unit in the running period. One thread spends; another, of the ledger's own, writes.

    Args:
        path: its file; None keeps it in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._rows: dict[str, _Row] = {}
        self._written: dict[str, tuple[str, int]] = {}
        self._dirty, self._stopping = threading.Event(), threading.Event()
        self._changing, self._writing = threading.Lock(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._failed_until = 0.0
        if path is not None and path.exists():
            self._written = _read(path)
            self._rows = {name: _Row(period, amount) for name, (period, amount) in self._written.items()}

    def spent(self, key_id: str, budget: BudgetSpec, now: float) -> int:
        return self._row(key_id, budget, now).spent

    def add(self, key_id: str, budget: BudgetSpec, amount: int, now: float) -> None:
        """Count spending. The file follows."""
        if amount > 0:
            row = self._row(key_id, budget, now)
            self._change(key_id, budget, replace(row, spent=row.spent + amount))

    def promise(self, key_id: str, budget: BudgetSpec, amount: int, now: float) -> bool:
        """How much more may be spent in all by what is under way. False: `write` before any of it is.

        What is promised, and a little that saves most writes, stands in the file as if it were spent.
        """
        whole, name = allowance(budget), _name(key_id, budget)
        row = self._row(key_id, budget, now)
        spare = max(0, min(whole // SPARE_PARTS, whole - row.spent - amount))
        self._change(key_id, budget, replace(row, promised=amount, spare=spare))
        with self._changing:
            period, written = self._written.get(name, ("", 0))
        known = (written if period == row.period else 0) >= row.spent + amount
        return known or self._path is None or time.monotonic() < self._failed_until

    def write(self) -> None:
        """Bring the file up to date now. Where that fails, the log says so and promises are taken unwritten for a while."""
        assert self._path is not None
        with self._writing:
            with self._changing:
                told = {name: self._told(row) for name, row in self._rows.items()}
                if told == self._written:
                    return
                # What the file will no longer cover must not be relied on while it is written.
                self._written = {name: min(self._written.get(name, ("", 0)), row) for name, row in told.items()}
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                write_text(self._path, json.dumps(told))
            except OSError as error:
                self._failed_until = time.monotonic() + WRITE_EVERY_S
                log.error("%s: spending is not written down (%s)", self._path, first_line(error))
                return
            with self._changing:
                self._written = told

    def close(self) -> None:
        """Write what was really spent, and what is promised to those who have not ended."""
        self._stopping.set()
        self._dirty.set()
        if self._thread is not None:
            self._thread.join(5)

    def _told(self, row: _Row) -> tuple[str, int]:
        return row.period, row.spent + row.promised + (0 if self._stopping.is_set() else row.spare)

    def _row(self, key_id: str, budget: BudgetSpec, now: float) -> _Row:
        period = period_of(now, budget.per)
        row = self._rows.get(_name(key_id, budget))
        return row if row is not None and row.period == period else _Row(period)

    def _change(self, key_id: str, budget: BudgetSpec, row: _Row) -> None:
        name = _name(key_id, budget)
        with self._changing:
            if self._rows.get(name) == row:
                return
            self._rows[name] = row
        if self._path is not None:
            self._dirty.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_on, name="tiger-ledger", daemon=True)
                self._thread.start()

    def _write_on(self) -> None:
        while not self._stopping.is_set():
            self._dirty.wait()
            self._dirty.clear()
            self.write()
            self._stopping.wait(WRITE_EVERY_S)
        self.write()


def _name(key_id: str, budget: BudgetSpec) -> str:
    return f"{key_id} {'tokens' if budget.tokens is not None else 'money'}/{budget.per}"


def _read(path: Path) -> dict[str, tuple[str, int]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {name: (str(period), int(amount)) for name, (period, amount) in rows.items()}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        aside = path.with_suffix(".broken")
        log.error("%s cannot be read (%s); set aside as %s, spending begins at 0", path, first_line(error), aside.name)
        if path.exists():
            os.replace(path, aside)
        return {}

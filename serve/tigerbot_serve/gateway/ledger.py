"""What keys have spent of their budgets in this day or month. It outlives the process.

Amounts are integers: tokens, or millionths of the money unit. The file is written whole and atomically, at most once a
second and by a thread of its own; a process that is killed forgets the last second's spending, never more.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tigerbot.errors import first_line
from tigerbot.runs import write_text
from tigerbot.spec.access import BudgetSpec, Period, PriceSpec

log = logging.getLogger(__name__)

WRITE_EVERY_S = 1.0
MONEY_UNIT = 1_000_000


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


class Ledger:
    """Spending by key and unit in the running period.

    Args:
        path: its file; None keeps it in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._spent: dict[str, tuple[str, int]] = {}
        self._dirty, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        if path is not None and path.exists():
            self._spent = _read(path)

    def spent(self, key_id: str, budget: BudgetSpec, now: float) -> int:
        period, amount = self._spent.get(_row(key_id, budget), ("", 0))
        return amount if period == period_of(now, budget.per) else 0

    def add(self, key_id: str, budget: BudgetSpec, amount: int, now: float) -> None:
        """Count spending. The caller is one thread; the file follows."""
        if amount <= 0:
            return
        total = self.spent(key_id, budget, now) + amount
        self._spent[_row(key_id, budget)] = (period_of(now, budget.per), total)
        if self._path is not None:
            self._dirty.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_on, name="tiger-ledger", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Write what is not written yet."""
        self._stopping.set()
        self._dirty.set()
        if self._thread is not None:
            self._thread.join(5)

    def _write_on(self) -> None:
        while not self._stopping.is_set():
            self._dirty.wait()
            self._dirty.clear()
            self._write()
            self._stopping.wait(WRITE_EVERY_S)
        self._write()

    def _write(self) -> None:
        assert self._path is not None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._path, json.dumps(dict(self._spent)))
        except OSError as error:
            log.error("%s: spending is not written down (%s)", self._path, first_line(error))


def _row(key_id: str, budget: BudgetSpec) -> str:
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

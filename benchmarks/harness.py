"""Runs us and the stock alternative in turn, several times, and gives the median ratio with its spread.

A benchmark is a module with `main() -> list[Row]`. Two things that are compared run as alternating pairs, so that a
slow minute of the machine hits both; the ratio is taken per pair.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

PAIRS = 5


@dataclass(frozen=True)
class Row:
    """One line of RESULTS.md. `value` is what `measure` says; low and high span the pairs (or rounds)."""

    measure: str
    value: float
    low: float
    high: float
    better: str
    target: str
    rounds: int
    ours: str = ""
    stock: str = ""
    note: str = ""


def ratio(
    measure: str,
    ours: Callable[[], float],
    stock: Callable[[], float],
    *,
    unit: str,
    target: str,
    better: str = "higher",
    pairs: int = PAIRS,
    note: str = "",
) -> Row:
    """Ours divided by stock over alternating pairs; both give a number in `unit`."""
    ours_found, stock_found = [], []
    for pair in range(pairs):
        order = (ours, stock) if pair % 2 == 0 else (stock, ours)
        for side in order:
            (ours_found if side is ours else stock_found).append(side())
        print(f"  {measure}: pair {pair + 1}/{pairs}: {ours_found[-1]:.4g} / {stock_found[-1]:.4g} {unit}", flush=True)
    ratios = [a / b for a, b in zip(ours_found, stock_found, strict=True)]
    return Row(
        measure=f"{measure}, ours / stock",
        value=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        better=better,
        target=target,
        rounds=pairs,
        ours=f"{statistics.median(ours_found):.4g} {unit}",
        stock=f"{statistics.median(stock_found):.4g} {unit}",
        note=note,
    )


def rate(
    measure: str, run: Callable[[], float], *, target: str, better: str, rounds: int = PAIRS, note: str = ""
) -> Row:
    """A number of our own over several rounds."""
    found = [run() for _ in range(rounds)]
    return Row(measure, statistics.median(found), min(found), max(found), better, target, rounds, note=note)


def bootstrap(found: Sequence[float], *, draws: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the median of what was found, by drawing from it with replacement."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(found, k=len(found))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def machine() -> str:
    """What the numbers were measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = psutil.virtual_memory().total / 2**30
    return f"{psutil.cpu_count()} cores of {model}, {memory:.0f} GiB, Linux {platform.release().split('-')[0]}"


def table(rows: list[Row]) -> str:
    """Rows as Markdown."""
    lines = ["| measure | value | spread | better | target | rounds | ours | stock | note |", "| " + "--- | " * 9]
    for row in rows:
        spread = f"{row.low:.3g} ... {row.high:.3g}"
        cells = (
            row.measure,
            f"{row.value:.3g}",
            spread,
            row.better,
            row.target,
            row.rounds,
            row.ours,
            row.stock,
            row.note,
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def save(rows: list[Row], path: Path) -> None:
    path.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=1))

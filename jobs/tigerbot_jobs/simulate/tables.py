"""The simulator's results as tables: lines for a terminal, Markdown for the docs. Takes the result that is kept as JSON."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

Cells = Sequence[str]
Table = tuple[Cells, Sequence[Cells]]
_SHOWN = (
    ("step", "training"),
    ("recompute", "done again"),
    ("checkpoint_block", "saving"),
    ("hang_wait", "noticing"),
    ("idle_after_failure", "replacing"),
    ("restore", "restoring"),
    ("resize", "resizing"),
    ("start", "starting"),
    ("other", "planned"),
)


def result_lines(result: dict[str, Any]) -> list[str]:
    """What `tiger simulate` prints."""
    lines = [result["about"], ""]
    lines += plain_table(*_policies(result["policies"]))
    lines += ["", "Where the wall time goes, percent:"]
    lines += plain_table(*_shares(result["policies"]))
    for shelf in result.get("buy", []):
        lines += ["", f"What to buy at {shelf['cards']:,} cards:"]
        lines += plain_table(*shelf_table(shelf))
        lines += ["", *plain_table(*interval_table(shelf))] if shelf["intervals"] else []
        lines += ["", best_line(shelf)]
    return lines


def plain_table(head: Cells, rows: Sequence[Cells]) -> list[str]:
    """Aligned columns: the first to the left, numbers to the right."""
    widths = [max(_width(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(_fit(cell, widths[i], left=i == 0) for i, cell in enumerate(row)).rstrip() for row in (head, *rows)
    ]


def markdown(head: Cells, rows: Sequence[Cells]) -> list[str]:
    """The same as a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def shelf_table(shelf: dict[str, Any]) -> Table:
    """Rows by spares, a column of goodput and money for each policy and number of standbys."""
    offers = shelf["offers"]
    columns = list(dict.fromkeys((offer["policy"], offer["standbys"]) for offer in offers))
    several = {policy for policy, _ in columns if sum(policy == other for other, _ in columns) > 1}
    names = [f"{policy}, {standbys} warm" if policy in several else policy for policy, standbys in columns]
    rows = []
    for spares in sorted({offer["spares"] for offer in offers}):
        by_column = {(o["policy"], o["standbys"]): o for o in offers if o["spares"] == spares}
        cells = [_goodput_and_price(by_column.get(column)) for column in columns]
        rows.append([f"{spares} ({100 * spares / shelf['nodes']:.1f}%)", *cells])
    return ["spare nodes", *names], rows


def interval_table(shelf: dict[str, Any]) -> Table:
    """The best offer of ours at other snapshot intervals."""
    found = shelf["intervals"]
    rows = [
        [f"{o['memory_every_s']:g} s", _percent(o["goodput"]), f"{o['per_useful']:.3f}", f"{100 * o['blocked']:.2f}%"]
        for o in found
    ]
    return ["snapshot every", "goodput", "per useful card-hour", "saving"], rows


def best_line(shelf: dict[str, Any]) -> str:
    """What costs least per useful card-hour, for each policy."""
    parts = [
        f"{best['policy']}: {best['spares']} spare nodes, {best['standbys']} of them warm, {_percent(best['goodput'])}, "
        f"{best['per_useful']:.3f} per useful card-hour"
        for best in shelf["best"]
    ]
    return "Least cost: " + "; ".join(parts) + "."


def _policies(policies: list[dict[str, Any]]) -> Table:
    head = ["policy", "goodput", "95% interval", "90% of runs", "in steps", "failures", "waits", "cost", "per useful"]
    rows = [
        [
            one["name"],
            _percent(one["goodput"]["mean"]),
            f"{_percent(one['goodput']['low'])} .. {_percent(one['goodput']['high'])}",
            f"{_percent(one['goodput']['run_low'])} .. {_percent(one['goodput']['run_high'])}",
            _percent(one["step_time"]["mean"]),
            f"{one['failures']:.1f}",
            f"{one['waits']:.1f}",
            f"{one['money']['total']:,.0f}",
            f"{one['money']['per_useful']:.3f}",
        ]
        for one in policies
    ]
    return head, rows


def _shares(policies: list[dict[str, Any]]) -> Table:
    head = ["policy", *(shown for _, shown in _SHOWN)]
    rows = [[one["name"], *(f"{100 * one['shares'][key]:.2f}" for key, _ in _SHOWN)] for one in policies]
    return head, rows


def _goodput_and_price(offer: dict[str, Any] | None) -> str:
    return f"{_percent(offer['goodput'])} at {offer['per_useful']:.3f}" if offer else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _fit(text: str, width: int, *, left: bool) -> str:
    space = " " * (width - _width(text))
    return text + space if left else space + text

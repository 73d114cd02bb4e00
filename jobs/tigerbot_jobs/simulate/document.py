"""`python -m tigerbot_jobs.simulate.document docs/simulator.md`: put the numbers of jobs/simulate.yaml into the page.

Only what stands between the two marks is replaced. Same seed, same numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tigerbot.runs import write_text
from tigerbot.spec import SimulateSpec, load_spec
from tigerbot_jobs.simulate.job import simulate_spec
from tigerbot_jobs.simulate.published import Compared, Target, dlrover, llama3, targets
from tigerbot_jobs.simulate.tables import best_line, interval_table, markdown, shelf_table

BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
SPEC = "jobs/simulate.yaml"


def main(page: Path) -> None:
    """Simulate and rewrite the generated part of the page."""
    spec = load_spec(SPEC)
    assert isinstance(spec, SimulateSpec)
    lines = compared_lines([*llama3(spec.replicas), *dlrover(spec.replicas)])
    lines += target_lines(targets(spec.replicas))
    lines += buy_lines(spec, simulate_spec(spec))
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    write_text(page, before + "\n".join([BEGIN, "", *lines, "", END]) + rest.split(END)[1])


def compared_lines(cases: list[Compared]) -> list[str]:
    """Published against simulated."""
    rows = [[one.case, one.published, _interval(one.outcome.goodput), f"{one.outcome.mtbf_h:.2f} h"] for one in cases]
    return ["### Published runs", "", *markdown(["case", "published", "simulated, 95% interval", "M"], rows), ""]


def target_lines(found: list[Target]) -> list[str]:
    """The targets with the defaults of `ours`."""
    rows = [
        [
            f"{one.cards:,}",
            f"{one.outcome.mtbf_h:.2f} h ({one.preset})",
            str(one.spares),
            f"{100 * one.wanted:.0f}%" if one.wanted else "shown",
            _interval(one.outcome.goodput),
            f"{100 * one.outcome.step_time.mean:.2f}%",
        ]
        for one in found
    ]
    head = ["cards", "M", "spare nodes", "target", "goodput of ours, 95% interval", "time in steps"]
    return ["### Targets", "", *markdown(head, rows), ""]


def buy_lines(spec: SimulateSpec, result: dict[str, Any]) -> list[str]:
    """What to buy, a table a size."""
    lines = [
        f"### What should I buy ({spec.days:g} days, {spec.failures.preset}, {spec.price_per_card_hour:g} a card-hour)",
        "",
        "Goodput, and what a useful card-hour costs with all spares paid.",
    ]
    for shelf in result["buy"]:
        lines += ["", f"**{shelf['cards']:,} cards**", "", *markdown(*shelf_table(shelf))]
        lines += ["", "Ours at its cheapest, by snapshot interval:", "", *markdown(*interval_table(shelf))]
        lines += ["", best_line(shelf)]
    return lines


def _interval(found: Any) -> str:
    return f"{100 * found.mean:.2f}% ({100 * found.low:.2f} .. {100 * found.high:.2f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

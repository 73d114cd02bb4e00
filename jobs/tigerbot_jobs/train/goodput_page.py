"""The account of a run as one HTML file: no scripts, nothing from outside, opens anywhere and in ten years."""

from __future__ import annotations

import html
import json
import math
import time
from pathlib import Path
from typing import Any

from tigerbot_jobs import webpage
from tigerbot_jobs.shown import clock, money, printable, span
from tigerbot_jobs.train.goodput import Account, Loss, percentile
from tigerbot_jobs.train.goodput_pictures import COLOURS, PHASES, lane, loss_curve, over_time, whole_bar
from tigerbot_jobs.train.goodput_text import MEANINGS, headline, outcome, throughput, who
from tigerbot_jobs.train.ledger import finite
from tigerbot_jobs.webpage import chip, document, keys, tiles

_LANES = 60  # incidents with a picture: the dearest; all are in the table
_STYLE = """
.incident{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem;margin:.8rem 0}
.incident p{margin:.15rem 0 .5rem;overflow-wrap:anywhere} svg .mark{fill:#c0392b;font-weight:600}
svg .life{stroke-dasharray:3 2} svg .back{fill:#d55e00;fill-opacity:.13} svg .tick,svg .life{stroke:var(--soft)}
@media print{.incident{break-inside:avoid}}
"""


def write_page(path: Path, found: Account, state: str, metrics: Path) -> Path:
    """Write the page; `metrics` is the run's metrics.jsonl, which may not be there.

    Raises:
        StorageError: the page cannot be written there.
    """
    return webpage.write(path, page(found, state, logged_rows(metrics)))


def page(found: Account, state: str, rows: list[dict[str, float]]) -> str:
    """The whole page as text."""
    name = printable(found.name) or "run"
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.began))
    about = f"since {began}: {html.escape(headline(found, state))}<br>{throughput(found)}"
    sections = [
        f"<h1>{html.escape(name)}{chip(state)}</h1><p class=note>{about}</p>",
        tiles(_tiles(found)),
        "<h2>Where the time went</h2>" + whole_bar(found.seconds) + _categories(found),
        "<h2>Over time</h2>"
        + over_time(found)
        + keys({name: COLOURS[name] for name in COLOURS if found.seconds[name] >= 0.05}),
        f"<h2>Incidents</h2>{_incidents(found)}",
        "<h2>Loss</h2>" + loss_curve(rows, _rollbacks(found)),
        "<p class=note>Green is the history of the model; orange was undone by a restore or a rollback (↩).</p>",
    ]
    return document(f"{name}: goodput", "\n".join(sections), style=_STYLE)


def logged_rows(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl in the order they were written, also those of steps that were undone later."""
    rows: list[dict[str, float]] = []
    if not path.is_file():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            raw: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(raw, dict) and finite(raw.get("step")) is not None:
            numbers = {name: finite(value) for name, value in raw.items()}
            rows.append({name: math.nan if value is None else value for name, value in numbers.items()})
    return rows


def _tiles(found: Account) -> list[tuple[str, str]]:
    recovery = [f"{percentile(found.mttr_s, q):.2f} s" for q in (50, 99)] if found.mttr_s else ["–", "–"]
    shown = [
        (f"{found.goodput:.1%}", "goodput"),
        (f"{found.goodput_throughput:.1%}", "of the best throughput"),
        (span(found.wall_s), "wall time"),
        (f"{found.steps:,}", "steps kept"),
        (f"{found.undone_steps:,}", "steps in vain"),
        (f"{len(found.losses)}", "incidents"),
        (recovery[0], "recovery, median"),
        (recovery[1], "recovery, p99"),
    ]
    if found.cost is not None:
        shown.append((money(found.cost, found.cost), f"cost at {found.price_per_card_hour:g} a card-hour"))
    return shown


def _categories(found: Account) -> str:
    paid = found.cost is not None
    rows = [
        f"<tr><th>category<th>what it is<th class=n>seconds<th class=n>share<th>{'<th class=n>cost' if paid else ''}"
    ]
    for name, meaning in MEANINGS.items():
        seconds, share = found.seconds[name], found.seconds[name] / (found.wall_s or 1)
        cost = f"<td class=n>{money(found.cost * share, found.cost)}" if found.cost is not None else ""
        bar = f'<div class=bar style="width:{share * 100:.2f}%;background:{COLOURS[name]}"></div>' if seconds else ""
        rows.append(
            f'<tr><td><i class=key style="background:{COLOURS[name]}"></i>{name}<td class=note>{meaning}'
            f"<td class=n>{seconds:,.1f}<td class=n>{share:.2%}<td style='width:22%'>{bar}{cost}"
        )
    cost = f"<td class=n>{money(found.cost, found.cost)}" if found.cost is not None else ""
    rows.append(f"<tr class=total><td>wall time<td><td class=n>{found.wall_s:,.1f}<td class=n>100%<td>{cost}")
    notes = []
    if found.stopped_s:
        notes.append(f"{span(found.stopped_s)} of it lie between a stop and the next start; no card is paid for them.")
    if found.missing_lines:
        notes.append(f"{found.missing_lines} events are missing: they could not be written.")
    return f"<table>{''.join(rows)}</table>" + "".join(f"<p class=note>{note}</p>" for note in notes)


def _incidents(found: Account) -> str:
    numbered = list(enumerate(found.losses, 1))
    if not numbered and not found.resizes:
        return "<p class=note>none</p>"
    drawn = sorted((one for one in numbered if one[1].incident.down_from is not None), key=lambda one: -one[1].total_s)
    chosen = {number for number, _ in drawn[:_LANES]}
    cards = [_card(f"{number}", loss, found, drawn=number in chosen) for number, loss in numbered if number in chosen]
    cards += [_card("+", loss, found, drawn=True) for loss in found.resizes[:_LANES]]
    noted = [_card(f"{number}", loss, found, drawn=False) for number, loss in numbered if number not in chosen]
    return keys(PHASES) + "".join(cards + noted)


def _card(number: str, loss: Loss, found: Account, *, drawn: bool) -> str:
    incident = loss.incident
    title = html.escape(printable(f"{number} · {clock(incident.seen_at)} · {incident.kind}{who(loss)}"))
    cost = "" if found.cost is None else f", cost {money(found.cost * loss.total_s / (found.wall_s or 1), found.cost)}"
    acted = f"{', '.join(dict.fromkeys(incident.actions))}; " if incident.actions else ""
    lost = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in loss.seconds.items())
    seen = f"seen {incident.mttd_s:.2f} s after the last step; " if incident.mttd_s is not None else ""
    facts = f"{seen}{acted}{outcome(loss)}; {len(incident.undone)} steps undone; lost {loss.total_s:.2f} s{cost}"
    evidence = "".join(
        f"<p>{html.escape(printable(f'{fault.kind}: {fault.evidence[:2000]}'))}</p>"
        for fault in incident.faults
        if fault.evidence
    )
    picture = lane(loss, found.wall_s) if drawn else ""
    said = html.escape(printable(facts + (f" ({lost})" if lost else "")))
    return f"<div class=incident><h3>{title}</h3><p class=note>{said}</p>{evidence}{picture}</div>"


def _rollbacks(found: Account) -> list[tuple[int, int]]:
    """(last step done, step gone back to) of each incident that made steps undone."""
    steps = [[turn.step for turn in loss.incident.undone] for loss in found.losses]
    return [(max(undone), min(undone) - 1) for undone in steps if undone]

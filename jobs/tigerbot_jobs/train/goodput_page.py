"""The account of a run as one HTML file: no scripts, nothing from outside, opens anywhere and in ten years."""

from __future__ import annotations

import html
import json
import math
import time
from pathlib import Path
from typing import Any

from tigerbot.errors import StorageError
from tigerbot.runs import write_text
from tigerbot_jobs.train.goodput import Account, Loss, percentile
from tigerbot_jobs.train.goodput_pictures import COLOURS, PHASES, lane, loss_curve, over_time, whole_bar
from tigerbot_jobs.train.goodput_text import MEANINGS, clock, headline, money, outcome, printable, span, throughput, who
from tigerbot_jobs.train.ledger import finite

_LANES = 60  # incidents with a picture: the dearest; all are in the table
STYLE = """
:root{--ink:#1d2733;--soft:#66727e;--line:#dde3ea;--paper:#fbfcfd;--card:#fff}
body{font:15px/1.55 system-ui,"Noto Sans CJK SC",sans-serif;max-width:66rem;margin:2rem auto;padding:0 1.2rem;color:var(--ink);
background:var(--paper)} h1{font-size:1.6rem;margin:0} h2{margin:2.4rem 0 .6rem;font-size:1.15rem} h3{font-size:1rem;margin:0}
.note{color:var(--soft);margin:.3rem 0} .state{font-size:.8rem;padding:.15rem .6rem;border-radius:1rem;color:#fff;
vertical-align:middle;margin-left:.6rem} table{border-collapse:collapse;width:100%}
td,th{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap} .total td{font-weight:600;border-bottom:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.4rem,1fr));gap:.8rem;margin:1.4rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.tile b{display:block;font-size:1.3rem;font-weight:650;white-space:nowrap;font-variant-numeric:tabular-nums} .tile span{color:var(--soft);
font-size:.85rem} i.key{display:inline-block;width:.75rem;height:.75rem;border-radius:.15rem;margin-right:.5rem}
.keys{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.85rem;color:var(--soft);margin:.4rem 0}
.incident{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem;margin:.8rem 0}
.incident p{margin:.15rem 0 .5rem;overflow-wrap:anywhere} svg{width:100%;height:auto;font-size:11px;fill:var(--soft);display:block}
svg .in{fill:#fff} svg .mark{fill:#c0392b;font-weight:600} svg .grid{stroke:var(--line)} svg .tick,svg .life{stroke:var(--soft)}
svg .life{stroke-dasharray:3 2} svg .back{fill:#d55e00;fill-opacity:.13} .bar{height:.7rem;border-radius:.15rem;min-width:1px}
@media(prefers-color-scheme:dark){:root{--ink:#dfe6ec;--soft:#98a5b1;--line:#28313a;--paper:#12171c;--card:#182027}}
@media print{.incident{break-inside:avoid}}
"""
_STATES = {"running": "#2f6fb0", "done": "#12876f", "stopped": "#66727e", "failed": "#c0392b", "died": "#c0392b"}


def write_page(path: Path, found: Account, state: str, metrics: Path) -> Path:
    """Write the page; `metrics` is the run's metrics.jsonl, which may not be there.

    Raises:
        StorageError: the page cannot be written there.
    """
    try:
        write_text(path, page(found, state, logged_rows(metrics)))
    except OSError as error:
        raise StorageError(
            str(error.strerror).lower(), where=str(path), fix="give a file that can be written"
        ) from None
    return path


def page(found: Account, state: str, rows: list[dict[str, float]]) -> str:
    """The whole page as text."""
    name = html.escape(printable(found.name) or "run")
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.began))
    chip = f'<span class=state style="background:{_STATES.get(state, "#66727e")}">{html.escape(state)}</span>'
    sections = [
        f"<h1>{name}{chip}</h1><p class=note>since {began}: {html.escape(headline(found, state))}<br>{throughput(found)}</p>",
        _tiles(found),
        "<h2>Where the time went</h2>" + whole_bar(found.seconds) + _categories(found),
        "<h2>Over time</h2>"
        + over_time(found)
        + _keys({name: COLOURS[name] for name in COLOURS if found.seconds[name] >= 0.05}),
        f"<h2>Incidents</h2>{_incidents(found)}",
        "<h2>Loss</h2>" + loss_curve(rows, _rollbacks(found)),
        "<p class=note>Green is the history of the model; orange was undone by a restore or a rollback (↩).</p>",
    ]
    head = (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{name}: goodput</title><style>{STYLE}</style>"
    )
    return head + "\n".join(sections) + "</html>\n"


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


def _tiles(found: Account) -> str:
    recovery = [f"{percentile(found.mttr_s, q):.2f} s" for q in (50, 99)] if found.mttr_s else ["–", "–"]
    tiles = [
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
        tiles.append((money(found.cost, found.cost), f"cost at {found.price_per_card_hour:g} a card-hour"))
    return (
        "<div class=tiles>" + "".join(f"<div class=tile><b>{v}</b><span>{n}</span></div>" for v, n in tiles) + "</div>"
    )


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
    return _keys(PHASES) + "".join(cards + noted)


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


def _keys(colours: dict[str, str]) -> str:
    keys = "".join(
        f'<span><i class=key style="background:{colour}"></i>{name}</span>' for name, colour in colours.items()
    )
    return f"<div class=keys>{keys}</div>"

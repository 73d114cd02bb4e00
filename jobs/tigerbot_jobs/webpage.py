"""What every page of ours is made of: one HTML file that wants nothing from outside and opens anywhere, in ten years.

A page may bring a script of its own; the policy in its head names that script's hash, so that nothing else runs, whatever
a name or an error message smuggles in.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping
from pathlib import Path

from tigerbot.errors import StorageError
from tigerbot.runs import write_text
from tigerbot_jobs.shown import printable

STYLE = """
:root{--ink:#1d2733;--soft:#66727e;--line:#dde3ea;--paper:#fbfcfd;--card:#fff;color-scheme:light dark}
body{font:15px/1.55 system-ui,"Noto Sans CJK SC","PingFang SC","Microsoft YaHei",sans-serif;max-width:66rem;margin:2rem auto;
padding:0 1.2rem;color:var(--ink);background:var(--paper)} h1{font-size:1.6rem;margin:0} h2{margin:2.4rem 0 .6rem;font-size:1.15rem}
h3{font-size:1rem;margin:0} .note{color:var(--soft);margin:.3rem 0} .state{font-size:.8rem;padding:.15rem .6rem;
border-radius:1rem;color:#fff;vertical-align:middle;margin-left:.6rem} table{border-collapse:collapse;width:100%}
td,th{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap} .total td{font-weight:600;border-bottom:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.4rem,1fr));gap:.8rem;margin:1.4rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem .9rem}
.tile b{display:block;font-size:1.3rem;font-weight:650;white-space:nowrap;font-variant-numeric:tabular-nums} .tile span{color:var(--soft);
font-size:.85rem} i.key{display:inline-block;width:.75rem;height:.75rem;border-radius:.15rem;margin-right:.5rem}
.keys{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:.85rem;color:var(--soft);margin:.4rem 0}
svg{width:100%;height:auto;font-size:11px;fill:var(--soft);display:block} svg .in{fill:#fff} svg .grid{stroke:var(--line)}
.bar{height:.7rem;border-radius:.15rem;min-width:1px}
@media(prefers-color-scheme:dark){:root{--ink:#dfe6ec;--soft:#98a5b1;--line:#28313a;--paper:#12171c;--card:#182027}}
"""
_STATES = {"running": "#2f6fb0", "done": "#12876f", "stopped": "#66727e", "failed": "#c0392b", "interrupted": "#c0392b"}


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """The whole page. `title` is text; `body` is HTML whose every word from outside is escaped already."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        body += f"<script>{script}</script>"
    head = (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f'<meta http-equiv=Content-Security-Policy content="{policy}">'
        f"<title>{html.escape(printable(title))}</title><style>{STYLE}{style}</style>"
    )
    return f"{head}{body}</html>\n"


def write(path: Path, page: str) -> Path:
    """Write a page atomically; returns its path.

    Raises:
        StorageError: it cannot be written there.
    """
    try:
        write_text(path, page)
    except OSError as error:
        raise StorageError(
            str(error.strerror).lower(), where=str(path), fix="give a file that can be written"
        ) from None
    return path


def chip(state: str) -> str:
    """The state of a run as a coloured word."""
    return (
        f'<span class=state style="background:{_STATES.get(state, "#66727e")}">{html.escape(printable(state))}</span>'
    )


def tiles(shown: Iterable[tuple[str, str]]) -> str:
    """Numbers with their names beneath, both HTML, as a row of cards."""
    cards = "".join(f"<div class=tile><b>{value}</b><span>{name}</span></div>" for value, name in shown)
    return f"<div class=tiles>{cards}</div>"


def keys(colours: Mapping[str, str]) -> str:
    """A legend: names, which are HTML, and their colours."""
    shown = "".join(
        f'<span><i class=key style="background:{colour}"></i>{name}</span>' for name, colour in colours.items()
    )
    return f"<div class=keys>{shown}</div>"

"""A sweep as one HTML file that says what to do next, and shows what that rests on.

It holds everything it needs and asks nobody for anything; one short script of its own (language, copy button) is named
by its hash, and the page is whole without it. Pure: the same history gives the same page.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tigerbot_jobs.shown import money as written
from tigerbot_jobs.shown import span
from tigerbot_jobs.sweep.analysis import History
from tigerbot_jobs.sweep.analysis_axes import axes
from tigerbot_jobs.sweep.analysis_cost import failures, hours_unit, money, spent, wall_s
from tigerbot_jobs.sweep.analysis_importance import importances
from tigerbot_jobs.sweep.analysis_search import counts_cards
from tigerbot_jobs.sweep.analysis_seeds import Recommendation, configurations, recommended
from tigerbot_jobs.sweep.page_advice import advice
from tigerbot_jobs.sweep.page_drawing import both, number, plain
from tigerbot_jobs.sweep.page_schedule import front_section, genealogy_section, rungs_section
from tigerbot_jobs.sweep.page_search import search_section, seeds_section
from tigerbot_jobs.sweep.page_space import importance_section, parallel_section, slices_section
from tigerbot_jobs.sweep.page_spec import ready_spec
from tigerbot_jobs.sweep.page_style import SCRIPT, STYLE
from tigerbot_jobs.sweep.page_tables import best_section, cost_section, failures_section
from tigerbot_jobs.webpage import chip, document, tiles


@dataclass(frozen=True)
class About:
    """What a page says of a sweep beside its journal. `spec` is the sweep's, as kept in its folder; empty where unknown."""

    name: str
    state: str
    spec: Mapping[str, Any] = field(default_factory=dict)


def page(history: History, about: About) -> str:
    """The whole page as text."""
    space, objectives = about.spec.get("space") or {}, about.spec.get("objectives") or {}
    found = recommended(history)
    parameters = axes(history, space)
    important = importances(history, parameters)
    order = [one.name for one in important]
    sections = {
        "next": (both("What to do next", "下一步"), advice(history, found, parameters, important, objectives)),
        "spec": (both("The recommended configuration", "推荐配置"), _spec(history, about, found)),
        "best": (both("Best so far", "至今最佳"), search_section(history)),
        "seeds": (both("What fresh seeds say", "新种子的结果"), seeds_section(history)),
        "front": (both("Pareto front", "帕累托前沿"), front_section(history, objectives)),
        "importance": (both("What mattered", "参数重要性"), importance_section(history, important, parameters)),
        "parallel": (both("Every trial", "全部试验"), parallel_section(history, parameters, order)),
        "slices": (both("One parameter at a time", "逐个参数"), slices_section(history, parameters, order)),
        "rungs": (both("Rungs", "梯级"), rungs_section(history)),
        "genealogy": (both("Genealogy", "谱系"), genealogy_section(history)),
        "cost": (both("What it cost", "成本"), cost_section(history)),
        "failures": (both("What failed", "失败"), failures_section(history)),
        "table": (both("The best trials", "最佳试验"), best_section(history, parameters)),
    }
    shown = {key: (title, body) for key, (title, body) in sections.items() if body}
    links = "".join(f"<a href=#{key}>{title}</a>" for key, (title, _) in shown.items())
    bodies = "".join(f"<section id={key}><h2>{title}</h2>{body}</section>" for key, (title, body) in shown.items())
    top = (
        f"<input type=checkbox id=zh aria-label=中文><div class=top><h1>{plain(about.name)}{chip(about.state)}</h1>"
        "<label for=zh class='switch language'><span class=en>中文</span><span class=zh>English</span></label></div>"
        f"<p class=note>{_headline(history)}</p>"
    )
    body = f"{top}{tiles(_tiles(history, found))}<nav aria-label=sections>{links}</nav><main>{bodies}</main>{_foot(history)}"
    return document(f"{about.name}: sweep", body, style=STYLE, script=SCRIPT)


def _headline(history: History) -> str:
    if not history.lives:
        return both("no driver has opened this sweep yet", "还没有驱动打开过这个扫参")
    life, drivers = history.lives[-1], len(history.lives)
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime(history.lives[0].t))
    lives = "" if drivers == 1 else f", {drivers} drivers"
    lives_zh = "" if drivers == 1 else f"，{drivers} 个驱动"
    how = f"{plain(life.searcher)}, {plain(life.scheduler)}"
    return both(
        f"{plain(life.metric)} ({life.mode}), {how}; since {began}{lives}",
        f"{plain(life.metric)}（{life.mode}），{how}；始于 {began}{lives_zh}",
    )


def _tiles(history: History, found: Recommendation | None) -> list[tuple[str, str]]:
    over = sum(not trial.running for trial in history.trials.values())
    rows, best = spent(history), configurations(history)[:1]
    card_hours, hours = sum(row.card_hours for row in rows), sum(row.hours for row in rows)
    cost, broken = money(history, card_hours), sum(failure.attempts for failure in failures(history))
    cards = counts_cards(history)
    shown = [
        (f"{over:,}", both(f"trials over, {broken:,} attempts failed", f"个试验已结束，失败 {broken:,} 次")),
        (number(best[0].value) if best else "–", both("best in the search", "搜索中的最佳")),
    ]
    if found is not None and found.rerun is not None:
        shown.append((number(found.value), both("with fresh seeds", "新种子均值")))
    shown.append((f"{card_hours if cards else hours:,.2f}", both(hours_unit(history), "卡时" if cards else "试验小时")))
    if cost is not None:
        shown.append(
            (written(cost, cost), both(f"money, at {history.price:g} a card-hour", f"费用，每卡时 {history.price:g}"))
        )
    shown.append((span(wall_s(history)), both("wall time", "历时")))
    return shown


def _spec(history: History, about: About, found: Recommendation | None) -> str:
    if found is None:
        return ""
    ready = ready_spec(about.name, about.spec, found.trial.params)
    note = both(
        f"Save as {plain(ready.name)}.yaml, then: <code>tiger submit {plain(ready.name)}.yaml --cluster URL</code>",
        f"保存为 {plain(ready.name)}.yaml，然后：<code>tiger submit {plain(ready.name)}.yaml --cluster URL</code>",
    )
    if ready.problem:
        note = both(f"Only its fields: {plain(ready.problem)}", f"仅列出参数：{plain(ready.problem)}")
    button = (
        f"<button type=button data-copy=yaml><span class=ask>{both('copy', '复制')}</span>"
        f"<span class=said role=status>{both('copied', '已复制')}</span></button>"
    )
    return f"<p class=note>{note}</p><div class=spec>{button}<pre id=yaml tabindex=0>{_lines(ready.text)}</pre></div>"


def _lines(text: str) -> str:
    """YAML as HTML: its line breaks stay, everything else is as any word from outside."""
    return "\n".join(plain(line) for line in text.splitlines()) + "\n"


def _foot(history: History) -> str:
    if not history.unreadable:
        return ""
    count = f"{history.unreadable:,}"
    return f"<p class=note>{both(f'{count} lines of the journal could not be read.', f'日志中有 {count} 行无法读取。')}</p>"

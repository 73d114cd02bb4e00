"""Pictures of what a scheduler did: the rungs where trials were stopped, a population's genealogy, a Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from tigerbot_jobs.demo.figures import Scale, short
from tigerbot_jobs.sweep.analysis import Exploit, History
from tigerbot_jobs.sweep.analysis_axes import shown
from tigerbot_jobs.sweep.analysis_front import Standing, fronts
from tigerbot_jobs.sweep.analysis_search import RungSummary, Stretch, rung_summaries, winning_line
from tigerbot_jobs.sweep.page_drawing import (
    Frame,
    Point,
    both,
    dots,
    figure,
    frame,
    grid,
    legend,
    number,
    picture,
    plain,
    svg_both,
    table,
)

_FOUNDERS = 8  # colours of a population's founders; more take them again
_MEMBERS = 60


def rungs_section(history: History) -> str:
    found = rung_summaries(history)
    if not found:
        return ""
    note = both(
        "Each column is a rung. ρ is Spearman's correlation of its order with that of the end, over the trials that ran to "
        "their end: these are alike in being good, so ρ is lower than it would be over all.",
        "每列一个梯级。ρ 为该处排名与最终排名的 Spearman 相关，仅限训练到底的试验；它们都较好、彼此接近，因此 ρ 低于对全部试验的值。",
    )
    return figure(
        _rung_picture(history, found),
        keys=legend(("top", both("went on", "晋级")), ("rest", both("stopped", "停止"))),
        note=note,
        numbers=_rung_table(history, found),
    )


def genealogy_section(history: History) -> str:
    """Members of a population over steps, coloured by whose weights they hold; the winner's line stands out."""
    if not history.exploits:
        return ""
    best = history.best(1)
    winner = best[0].name if best else history.exploits[-1].name
    line = winning_line(history, winner)
    note = both(
        "A colour is a founder: where it changes, a member took over another's weights. The dark line is the way of the "
        "winner's weights.",
        "颜色代表祖先：变色处表示该成员接管了另一成员的权重。深色线为获胜者权重的来路。",
    )
    return figure(_genealogy(history, winner, line), note=note, numbers=_exploit_table(history.exploits)) + _way(line)


def front_section(history: History, objectives: Mapping[str, str]) -> str:
    """Trials by two objectives, and those that none is better than in all."""
    if not objectives:
        return ""
    found = fronts(history, objectives)
    names = [history.metric, *objectives]
    if not any(one.front for one in found):
        return f"<p class=note>{both('no trial reported every objective yet', '还没有试验报告全部目标')}</p>"
    front = sorted((one for one in found if one.front), key=lambda one: one.values[0])
    rows = [(plain(one.trial.name), *map(number, one.values)) for one in front]
    heads = (both("trial", "试验"), *map(plain, names))
    modes = ", ".join(
        f"{plain(name)}: {plain(mode)}" for name, mode in ((history.metric, history.mode), *objectives.items())
    )
    return figure(
        _front_picture(found, front, names),
        keys=legend(("top", both("Pareto front", "帕累托前沿")), ("rest", both("other trials", "其他试验"))),
        note=both(
            f"No trial is better than one of these {len(front)} of {len(found)} in everything ({modes}).",
            f"{len(found)} 个试验中有 {len(front)} 个未被任何试验全面超越（{modes}）。",
        ),
        numbers=table(heads, rows, numbers=range(1, len(heads))),
    )


def _rung_picture(history: History, found: Sequence[RungSummary]) -> str:
    best = sorted((rung.value for one in found for rung in one.values), key=history.key)
    values = best[: max(2, math.ceil(0.9 * len(best)))]
    area = Frame(Scale([0, 1], 62, 946), Scale(values, 270, 40), 960, 330, top=40, bottom=60)
    wide = (area.width - area.left - area.right) / len(found)
    rng = np.random.default_rng(0)
    parts = [grid(area, svg_both("rung", "梯级"), plain(history.metric), x_ticks=False)]
    for at, one in enumerate(found):
        middle = area.left + wide * (at + 0.5)
        shift = rng.uniform(-0.32, 0.32, len(one.values)) * wide
        placed = [(middle + dx, area.at(0, rung.value)[1]) for dx, rung in zip(shift, one.values, strict=True)]
        stopped = [point for point, rung in zip(placed, one.values, strict=True) if not rung.promoted]
        went_on = [point for point, rung in zip(placed, one.values, strict=True) if rung.promoted]
        parts += [dots(stopped, "rest"), dots(went_on, "top")]
        share = f"{len(one.values):,} → {one.promoted:,} ({one.promoted / len(one.values):.0%})"
        parts.append(f'<text class="strong" x="{middle:.0f}" y="16" text-anchor="middle">{share}</text>')
        if one.correlation is not None:
            parts.append(f'<text x="{middle:.0f}" y="31" text-anchor="middle">ρ {one.correlation:.2f}</text>')
        step = svg_both(f"step {one.step:,}", f"第 {one.step:,} 步")
        parts.append(f'<text x="{middle:.0f}" y="{area.height - 40}" text-anchor="middle">{step}</text>')
    return picture(area, "rungs", "".join(parts))


def _rung_table(history: History, found: Sequence[RungSummary]) -> str:
    heads = (
        both("step", "步"),
        both("reached", "到达"),
        both("went on", "晋级"),
        both("share", "比例"),
        both("worst that went on", "晋级者中最差"),
        both("best", "最佳"),
        "ρ",
    )
    rows = []
    for one in found:
        went_on = [rung.value for rung in one.values if rung.promoted]
        rows.append(
            (
                f"{one.step:,}",
                f"{len(one.values):,}",
                f"{one.promoted:,}",
                f"{one.promoted / len(one.values):.0%}",
                number(max(went_on, key=history.key, default=None)),
                number(min((rung.value for rung in one.values), key=history.key)),
                "–" if one.correlation is None else f"{one.correlation:.2f}",
            )
        )
    return table(heads, rows, numbers=range(7))


def _genealogy(history: History, winner: str, line: Sequence[Stretch]) -> str:
    members = _members(history, winner)
    row = {name: at for at, name in enumerate(members)}
    end = max([stretch.end for stretch in line] + [exploit.step for exploit in history.exploits])
    tall = 26 if len(members) <= 20 else 14
    area = frame([0, end], [0, 1], height=tall * len(members) + 62, left=110)
    ys = {name: area.top + tall * (at + 0.5) for name, at in row.items()}
    parts = [grid(area, svg_both("step", "步"), "", y_ticks=False)]
    for name, y in ys.items():
        parts.append(f'<text x="98" y="{y + 4:.1f}" text-anchor="end">{plain(name)}</text>')
    for name, start, until, founder in _held(history, members, end):
        ends = f'x1="{area.across(start):.1f}" x2="{area.across(until):.1f}" y1="{ys[name]:.1f}" y2="{ys[name]:.1f}"'
        parts.append(f'<line class="member f{row[founder] % _FOUNDERS}" {ends}><title>{plain(founder)}</title></line>')
    for exploit in history.exploits:
        if exploit.name in ys and exploit.source in ys:
            title = plain(f"step {exploit.step}: {exploit.name} from {exploit.source}; {_changes(exploit)}")
            way = _bend(area.across(exploit.step), ys[exploit.source], ys[exploit.name])
            parts.append(f'<path class="taken" d="{way}"><title>{title}</title></path>')
    way = ""
    for stretch in line:
        if stretch.name not in ys:
            continue
        x, y = area.across(stretch.start), ys[stretch.name]
        if stretch.exploit is not None and stretch.exploit.source in ys:
            way += _bend(x, ys[stretch.exploit.source], y)
        way += f"M{x:.1f} {y:.1f}H{area.across(stretch.end):.1f}"
    parts.append(f'<path class="way" d="{way}"/>')
    return picture(area, "genealogy of the population", "".join(parts))


def _members(history: History, winner: str) -> list[str]:
    """The population from the best to the worst; of a large one those that matter first."""
    names = {name for exploit in history.exploits for name in (exploit.name, exploit.source)}
    names |= {winner}
    names |= {trial.name for trial in history.trials.values() if not trial.fresh}
    known = [name for name in names if name in history.trials]
    return sorted(known, key=lambda name: (history.key(history.trials[name].metric), name))[:_MEMBERS]


def _held(history: History, members: Sequence[str], end: int) -> list[tuple[str, int, int, str]]:
    """(member, from step, to step, founder of the weights it held); those who swap at a step do so at once."""
    founder, since = {name: name for name in members}, dict.fromkeys(members, 0)
    found = []
    for step in sorted({exploit.step for exploit in history.exploits}):
        before = dict(founder)
        for exploit in history.exploits:
            if exploit.step == step and exploit.name in founder and exploit.source in before:
                found.append((exploit.name, since[exploit.name], step, founder[exploit.name]))
                founder[exploit.name], since[exploit.name] = before[exploit.source], step
    return [*found, *((name, since[name], end, founder[name]) for name in members)]


def _way(line: Sequence[Stretch]) -> str:
    """The winner's weights, stretch by stretch, with what changed at each."""
    rows = [
        (
            f"{one.start:,}–{one.end:,}",
            plain(one.name),
            "–" if one.exploit is None else f"<code>{plain(_changes(one.exploit))}</code>",
        )
        for one in line
    ]
    return table((both("steps", "步"), both("held by", "持有者"), both("went on with", "之后的参数")), rows)


def _exploit_table(exploits: Sequence[Exploit]) -> str:
    heads = (both("step", "步"), both("member", "成员"), both("took over from", "接管自"), both("changed", "变化"))
    rows = [(f"{e.step:,}", plain(e.name), plain(e.source), f"<code>{plain(_changes(e))}</code>") for e in exploits]
    return table(heads, rows, numbers=(0,))


def _changes(exploit: Exploit) -> str:
    changed = [name for name in exploit.after if exploit.before.get(name) != exploit.after[name]]
    return (
        ", ".join(f"{name} {shown(exploit.before.get(name))} → {shown(exploit.after[name])}" for name in changed) or "–"
    )


def _bend(x: float, start: float, end: float) -> str:
    return f"M{x:.1f} {start:.1f}C{x + 9:.1f} {start:.1f} {x - 9:.1f} {end:.1f} {x:.1f} {end:.1f}"


def _front_picture(found: Sequence[Standing], front: Sequence[Standing], names: Sequence[str]) -> str:
    def clipped(at: int) -> list[float]:
        values = np.array([one.values[at] for one in found])
        on_front = [one.values[at] for one in front]
        low, high = np.percentile(values, [5, 95])
        return [min(float(low), *on_front), max(float(high), *on_front)]

    area = frame(clipped(0), clipped(1), height=360)

    def place(one: Standing) -> Point:
        x, y = area.at(one.values[0], one.values[1])
        return min(area.width - area.right, max(area.left, x)), y

    parts = [grid(area, plain(names[0]), plain(names[1]))]
    parts.append(dots([place(one) for one in found if not one.front], "rest"))
    for one in front:
        x, y = place(one)
        said = ", ".join(f"{name} {short(value)}" for name, value in zip(names, one.values, strict=True))
        parts.append(
            f'<circle class="ours" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{plain(one.trial.name)}: {plain(said)}</title></circle>'
        )
    return picture(area, f"{names[1]} against {names[0]}", "".join(parts))

"""Three pictures of a space: which parameters mattered, every trial across all of them, and each against the metric."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tigerbot_jobs.demo.figures import Scale, short
from tigerbot_jobs.sweep.analysis import History, Trial
from tigerbot_jobs.sweep.analysis_axes import Axis, shown
from tigerbot_jobs.sweep.analysis_importance import FORESTED, LEAST, MOST, Importance
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
    polyline,
    ticks,
)

_NAMED = 40  # lines that say their trial when pointed at
_SLICES, _AXES = 12, 14
_SPARSE = 100  # so few lines do not add up to anything
_BUNDLE = 12  # lines of one path: where paths cross, their colours add up
_GROUPS = ((0.02, "p4"), (0.1, "p3"), (0.3, "p2"), (1.0, "p1"))


def importance_section(history: History, found: Sequence[Importance], axes: Sequence[Axis]) -> str:
    if not found:
        few = both(
            f"Importance wants {LEAST} trials that share at least two parameters; there are {len(history.searched)}.",
            f"参数重要性至少需要 {LEAST} 个参数相同的试验；目前 {len(history.searched)} 个。",
        )
        return f"<p class=note>{few}</p>"
    left, tall = 190, 40
    area = Frame(Scale([0, 1], left, 946), Scale([0, 1], 0, 1), 960, tall * len(found) + 44, left=left, bottom=44)
    area.across.low, area.across.high = 0.0, max(0.05, *(max(one.fanova, one.ped_high) for one in found)) * 1.02
    parts = [grid(area, _svg_share(), "", y_ticks=False)]
    for row, one in enumerate(found):
        y = 6 + tall * row
        zero, fanova, ped = (area.across(value) for value in (0.0, one.fanova, one.ped))
        low, high = area.across(one.ped_low), area.across(one.ped_high)
        parts.append(
            f'<text x="{left - 10}" y="{y + 19}" text-anchor="end" class="strong">{plain(_cut(one.name, 26))}</text>'
        )
        parts.append(f"<g><title>fANOVA {one.fanova:.1%}</title>{_bar(zero, y + 3, fanova, 'fanova')}</g>")
        title = f"PED-ANOVA {one.ped:.1%}, 90% [{one.ped_low:.1%}, {one.ped_high:.1%}]"
        parts.append(f"<g><title>{title}</title>{_bar(zero, y + 17, ped, 'ped')}")
        parts.append(
            f'<path class="whisker" d="M{low:.1f} {y + 22.5}H{high:.1f}M{low:.1f} {y + 19}v7M{high:.1f} {y + 19}v7"/></g>'
        )
        parts.append(f'<text x="{max(fanova, zero) + 6:.1f}" y="{y + 12}">{one.fanova:.0%}</text>')
    left_out = [axis.name for axis in axes if axis.conditional]
    return figure(
        picture(area, "importance of parameters", "".join(parts)),
        keys=legend(
            ("fanova", both("fANOVA: share of the variance anywhere in the space", "fANOVA：整个空间内解释的方差份额")),
            (
                "ped",
                both(
                    "PED-ANOVA: what sets the best tenth apart, 90% interval",
                    "PED-ANOVA：最好的十分之一与其余的差别，90% 区间",
                ),
            ),
        ),
        note=_biased(history, left_out),
    )


def parallel_section(history: History, axes: Sequence[Axis], order: Sequence[str]) -> str:
    """Every trial as a line across its parameters to its value; the better, the darker."""
    ranked = history.best(len(history.searched))
    if not axes or not ranked:
        return ""
    chosen = _most_important(axes, order)[:_AXES]
    axes = [axis for axis in axes if axis in chosen]
    below = any(axis.conditional for axis in axes)
    area = frame([0, len(axes)], [0, 1], height=392 if below else 362, left=40, bottom=30)
    columns = [70 + 830 * at / len(axes) for at in range(len(axes) + 1)]
    values = _clipped(history, ranked)
    end = Scale([min(values), max(values)], 344.0, 52.0)
    if history.mode == "max":
        end.start, end.end = end.end, end.start
    lines = [
        _line(trial, axes, columns, end, spread) for trial, spread in zip(ranked, _spreads(len(ranked)), strict=True)
    ]
    parts, since = [], 0
    for share, kind in _GROUPS:
        until = math.ceil(share * len(ranked))
        group = lines[max(since, _NAMED) : until]
        bundles = [group[at : at + _BUNDLE] for at in range(0, len(group), _BUNDLE)]
        parts.append("".join(f'<path class="trial {kind}" d="{"".join(map(polyline, lot))}"/>' for lot in bundles))
        since = until
    parts.reverse()
    for rank in reversed(range(min(_NAMED, len(ranked)))):
        trial = ranked[rank]
        kind = "best" if rank == 0 else next(k for share, k in _GROUPS if rank < math.ceil(share * len(ranked)))
        said = ", ".join(f"{axis.name} {shown(trial.params[axis.name])}" for axis in axes if axis.name in trial.params)
        title = plain(f"{rank + 1}. {trial.name}: {number(trial.metric)}; {said}")
        parts.append(f'<path class="trial {kind} one" d="{polyline(lines[rank])}"><title>{title}</title></path>')
    parts += [_column(axis, x) for axis, x in zip(axes, columns, strict=False)]
    parts.append(_rule(columns[-1], history.metric, [(short(v), y) for v, y in ticks(end, 6)]))
    sparse = 'class="sparse"' if len(ranked) <= _SPARSE else ""
    switch = both("only the best tenth", "只看最好的十分之一")
    return figure(
        f"<label class=switch><input type=checkbox class=few> {switch}</label>"
        + picture(area, "parallel coordinates of all trials", "".join(parts), sparse),
        keys=legend(
            ("best", both("best", "最佳")),
            ("p4", both("best 2%", "前 2%")),
            ("p3", "10%"),
            ("p2", "30%"),
            ("p1", both("the rest", "其余")),
        ),
        note=both(
            "Point at a line of the best forty to see its trial. A value beyond the better nine tenths stands at the edge; "
            "a parameter that a trial does not have, below its axis.",
            "将鼠标移到前四十名的线上可看到对应试验。差于 90% 分位的值画在边缘；试验没有的参数画在轴下方。",
        ),
    )


def _line(trial: Trial, axes: Sequence[Axis], columns: Sequence[float], end: Scale, spread: float) -> list[Point]:
    points = []
    for axis, x in zip(axes, columns, strict=False):
        at = axis.place(trial.params)
        if at is not None and axis.choices:
            at += spread / len(axis.choices)
        points.append((x, 372.0 if at is None else 344.0 - 292 * at))
    assert trial.metric is not None
    return [*points, (columns[-1], _held(end, trial.metric))]


def _held(end: Scale, value: float) -> float:
    low, high = sorted((end.start, end.end))
    return min(high, max(low, end(value)))


def _spreads(count: int) -> list[float]:
    """Where in the width of a choice each line goes, so that many of them do not hide in one."""
    return [float(value) for value in np.random.default_rng(0).uniform(-0.3, 0.3, count)]


def slices_section(history: History, axes: Sequence[Axis], order: Sequence[str]) -> str:
    """The metric against each parameter, the important ones first."""
    ranked = history.best(len(history.searched))
    if not axes or not ranked:
        return ""
    chosen = _most_important(axes, order)[:_SLICES]
    values = _clipped(history, ranked)
    drawn = "".join(_slice(history, axis, ranked, values) for axis in chosen)
    more = len(axes) - len(chosen)
    hidden = both(f" {more} more parameters are not drawn.", f"另有 {more} 个参数未画出。") if more > 0 else ""
    note = both(
        "One dot a trial; green the best 5%, the ring the best. Values beyond the better nine tenths stand at the edge.",
        "每点一个试验；绿色为前 5%，圆环为最佳。差于 90% 分位的值画在边缘。",
    )
    return f"<div class=slices>{drawn}</div><p class=note>{note}{hidden}</p>"


def _most_important(axes: Sequence[Axis], order: Sequence[str]) -> list[Axis]:
    rank = {name: at for at, name in enumerate(order)}
    return sorted(axes, key=lambda axis: rank.get(axis.name, len(rank)))


def _svg_share() -> str:
    return '<tspan class="en" lang="en">share of the importance</tspan><tspan class="zh" lang="zh">重要性份额</tspan>'


def _slice(history: History, axis: Axis, ranked: Sequence[Trial], values: Sequence[float]) -> str:
    placed = [(trial, axis.place(trial.params)) for trial in ranked]
    area = Frame(Scale([0, 1], 46, 308), Scale(values, 158, 12), 316, 206, left=46, right=8, top=12, bottom=48)
    rng = np.random.default_rng(0)
    spread = 0.5 / len(axis.choices) if axis.choices else 0.0
    jitter = rng.uniform(-0.5, 0.5, len(placed)) * spread
    points = []
    for (trial, place), shift in zip(placed, jitter, strict=True):
        if place is not None and trial.metric is not None:
            points.append(area.at(place + shift, trial.metric))
    top = math.ceil(0.05 * len(points))
    parts = [grid(area, plain(_cut(axis.name, 40)), "", x_ticks=False)]
    parts += [
        f'<text x="{area.across(at):.1f}" y="{area.height - area.bottom + 15}" text-anchor="middle">{plain(text)}</text>'
        for at, text in _marks(axis, 5)
    ]
    parts += [dots(points[top:], "rest"), dots(points[1:top], "top")]
    if points:
        parts.append(f'<circle class="ring" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="5"/>')
    return picture(area, f"{history.metric} against {axis.name}", "".join(parts))


def _marks(axis: Axis, most: int) -> list[tuple[float, str]]:
    """Places of an axis that get a label."""
    if axis.choices:
        step = math.ceil(len(axis.choices) / 8)
        return [((at + 0.5) / len(axis.choices), _choice(text)) for at, text in enumerate(axis.choices)][::step]
    scale = Scale([axis.low, axis.high], 0, 1, log=axis.log)
    low, high = (math.log(v) if axis.log else v for v in (axis.low, axis.high))
    found = []
    for value, _ in ticks(scale, most):
        at = ((math.log(value) if axis.log else value) - low) / (high - low)
        if -1e-9 <= at <= 1 + 1e-9:
            found.append((at, short(value)))
    return found


def _column(axis: Axis, x: float) -> str:
    return _rule(x, axis.name, [(text, 344.0 - 292 * at) for at, text in _marks(axis, 6)])


def _rule(x: float, name: str, marks: Sequence[tuple[str, float]]) -> str:
    parts = [f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="46" y2="350"/>']
    parts.append(f'<text class="strong" x="{x:.1f}" y="30" text-anchor="middle">{plain(_cut(name, 18))}</text>')
    for text, y in marks:
        parts.append(f'<text class="halo" x="{x + 6:.1f}" y="{y + 4:.1f}">{plain(text)}</text>')
    return "".join(parts)


def _clipped(history: History, ranked: Sequence[Trial]) -> list[float]:
    """Values of the better nine tenths: one that diverged would squeeze all others into a line."""
    values = [trial.metric for trial in ranked if trial.metric is not None]
    return values[: max(2, math.ceil(0.9 * len(values)))]


def _bar(start: float, y: float, end: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{start:.1f}" y="{y:.1f}" width="{max(1.0, end - start):.1f}" height="11" rx="2"/>'


def _choice(text: str) -> str:
    return _cut(text[1:-1] if len(text) > 1 and text.startswith('"') and text.endswith('"') else text, 12)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[1 - most :]


def _biased(history: History, left_out: Sequence[str]) -> str:
    searcher = history.lives[-1].searcher if history.lives else ""
    scheduled = bool(history.rungs)
    about = f"optuna; forest over {FORESTED:,} trials at most, PED-ANOVA over {MOST:,}"
    english, chinese = (
        [f"Computed by {about}."],
        [f"由 optuna 计算；随机森林最多用 {FORESTED:,} 个试验，PED-ANOVA 最多 {MOST:,} 个。"],
    )
    if searcher not in ("random", "quasi", "grid"):
        english.append(f"The searcher ({plain(searcher)}) favoured good regions, so both are hints, not measurements.")
        chinese.append(f"搜索器（{plain(searcher)}）偏向好的区域，因此两者只是提示而非测量。")
    if scheduled:
        english.append("Stopped trials count with their last value.")
        chinese.append("被提前停止的试验按其最后值计。")
    if left_out:
        names = plain(", ".join(left_out))
        english.append(f"Left out, because not every trial has them: {names}.")
        chinese.append(f"未计入（并非每个试验都有）：{names}。")
    return both(" ".join(english), "".join(chinese))

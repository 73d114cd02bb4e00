"""Two pictures of a search: best so far beside random search, and what fresh seeds made of the best."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tigerbot_jobs.demo.figures import short
from tigerbot_jobs.sweep.analysis import History
from tigerbot_jobs.sweep.analysis_axes import shown
from tigerbot_jobs.sweep.analysis_cost import hours_unit
from tigerbot_jobs.sweep.analysis_search import Band, BestSoFar, best_so_far, i_epoch, random_band
from tigerbot_jobs.sweep.analysis_seeds import Rerun, expected_luck, noise, recommended, reruns
from tigerbot_jobs.sweep.page_drawing import (
    Frame,
    both,
    figure,
    frame,
    grid,
    legend,
    number,
    picture,
    plain,
    polyline,
    steps,
    svg_both,
    table,
)

_FRESH = 18  # rows of the picture of fresh seeds


def search_section(history: History) -> str:
    """Best so far against what was spent, with the band of random search and i-Epoch."""
    found = best_so_far(history)
    if not found.values:
        return _nothing()
    band, epochs = random_band(history), i_epoch(history)
    area = _area(found, band, epochs, history)
    unit = hours_unit(history)
    parts = [grid(area, svg_both(f"{unit} spent", "已用" + _hours(unit)), plain(history.metric))]
    if band is not None:
        lower = [area.at(x, y) for x, y in zip(band.costs, band.low, strict=True)]
        upper = [area.at(x, y) for x, y in zip(band.costs, band.high, strict=True)]
        parts.append(f'<path class="band" d="{polyline([*lower, *reversed(upper)])}Z"/>')
        middle = [area.at(x, y) for x, y in zip(band.costs, band.median, strict=True)]
        parts.append(f'<path class="line random" d="{polyline(middle)}"/>')
    for cost, value, until in epochs:
        x, y = area.at(cost, value)
        name = f"i-Epoch, i = {until}: {number(value)} for {short(cost)} {unit}"
        parts.append(f'<path class="epoch" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"><title>{name}</title></path>')
    parts += _steps(found, area, unit, history.mode == "min")
    parts.append(_fresh_level(history, area))
    rows = [
        (plain(name), short(cost), number(value))
        for name, cost, value in zip(found.names, found.costs, found.values, strict=True)
    ]
    heads = (both("new best", "新最佳"), both(unit, _hours(unit)), plain(history.metric))
    return figure(
        picture(area, f"best {history.metric} against {unit}", "".join(parts)),
        keys=legend(*_marks(band is not None, bool(epochs), "fresh" in parts[-1])),
        note=_about(band, population=bool(history.exploits)),
        numbers=table(heads, rows, numbers=(1, 2)),
    )


def seeds_section(history: History) -> str:
    """Search value beside fresh-seed mean and interval: the winner's curse, seen."""
    found, count = reruns(history)[:_FRESH], len(history.searched)
    if not found:
        luck = f"{expected_luck(count):.1f}"
        return (
            "<p class=callout>"
            + both(
                f"No configuration ran with a second seed, so the best value is a flattering one: of {count:,} equally good "
                f"configurations the best lies about {luck} standard deviations of the noise above what it is worth.",
                f"没有任何配置用第二个种子重跑过，最佳值因此偏乐观：{count:,} 个同样好的配置中，最佳者平均高出其真实水平约 "
                f"{luck} 个噪声标准差。",
            )
            + "</p>"
        )
    sigma = noise(history)
    curse = float(np.median([abs(one.curse) for one in found]))
    flattered = sum(history.better(one.searched, one.mean) for one in found)
    spread = "" if sigma is None else f" Noise between seeds: σ = {number(sigma)}."
    spread_zh = "" if sigma is None else f"种子间噪声 σ = {number(sigma)}。"
    note = both(
        f"The search flattered {flattered} of {len(found)}; half of the differences are above {number(curse)}.{spread} "
        "Intervals are 95% t-intervals of the mean of fresh seeds; rank by those means, not by the search.",
        f"{len(found)} 个配置中有 {flattered} 个在搜索时被高估；差值中位数为 {number(curse)}。{spread_zh}"
        "区间为新种子均值的 95% t 区间；请按均值排序，而不是按搜索值。",
    )
    return figure(
        _curse(history, found),
        keys=legend(
            ("hollow", both("value in the search", "搜索时的值")),
            ("ours", both("mean of fresh seeds, 95%", "新种子均值与 95% 区间")),
            ("speck", both("each fresh seed", "每个新种子")),
        ),
        note=note,
    ) + _seed_table(found)


def _area(found: BestSoFar, band: Band | None, epochs: Sequence[tuple[float, float, int]], history: History) -> Frame:
    """A frame from the best value to what a search had after its first few trials: what lies above says nothing."""
    xs = [cost for cost in (*found.costs, found.total) if cost > 0]
    ys = list(found.values[min(3, len(found.values) - 1) :])
    if band is not None:
        early = min(8, len(band.costs) - 1)
        ys += [*band.median[early:], float(band.low[-1]), float(band.high[early])]
        xs += [float(band.costs[0]), float(min(band.costs[-1], found.total))]
    xs += [cost for cost, _, _ in epochs if cost > 0]
    rerun = recommended(history)
    ys += [rerun.value] if rerun is not None and rerun.rerun is not None else []
    best, span = found.values[-1], max(ys) - min(ys)
    ys.append(best - 0.07 * span if history.mode == "min" else best + 0.07 * span)  # room for its name
    return frame(xs or [0.0, 1.0], ys, height=360, log_x=bool(xs) and min(xs) > 0)


def _steps(found: BestSoFar, area: Frame, unit: str, best_is_low: bool) -> list[str]:
    first = area.across.start
    placed = [
        area.at(x, y) if x > 0 else (first, area.at(1, y)[1]) for x, y in zip(found.costs, found.values, strict=True)
    ]
    parts = [f'<path class="line ours" d="{steps(placed, area.at(found.total or 1, 0)[0])}"/>']
    for (x, y), name, cost, value in zip(placed, found.names, found.costs, found.values, strict=True):
        title = f"{plain(name)}: {number(value)} at {short(cost)} {unit}"
        parts.append(f'<circle class="ours" cx="{x:.1f}" cy="{y:.1f}" r="3.2"><title>{title}</title></circle>')
    x, y = placed[-1]
    side = "end" if x > area.width * 0.6 else "start"
    label = f"{plain(found.names[-1])} {number(found.values[-1])}"
    below = y + 17 if best_is_low else y - 9
    parts.append(f'<text class="strong edged" x="{x:.1f}" y="{below:.1f}" text-anchor="{side}">{label}</text>')
    return parts


def _fresh_level(history: History, area: Frame) -> str:
    found = recommended(history)
    if found is None or found.rerun is None:
        return ""
    y = area.at(1, found.value)[1]
    ends = f'x1="{area.left}" x2="{area.width - area.right}" y1="{y:.1f}" y2="{y:.1f}"'
    return f'<line class="fresh" {ends}><title>fresh-seed mean {number(found.value)}</title></line>'


def _marks(band: bool, epochs: bool, fresh: bool) -> list[tuple[str, str]]:
    marks = [
        (True, "ours", both("this sweep", "本次扫参")),
        (band, "random", both("random search, median and 5–95%", "随机搜索：中位数与 5–95% 区间")),
        (epochs, "epoch", "i-Epoch"),
        (fresh, "fresh", both("fresh-seed mean of the recommended one", "推荐配置的新种子均值")),
    ]
    return [(kind, name) for drawn, kind, name in marks if drawn]


def _about(band: Band | None, *, population: bool) -> str:
    if population:
        return both(
            "The best of the population while it trained. Members take over each other's weights, so nothing here is a "
            "random search to compare with.",
            "训练过程中种群的最佳值。成员之间会接管权重，因此没有可比的随机搜索。",
        )
    epoch = "i-Epoch: all configurations for i steps, then the best to the end (arXiv 2404.04111), from these curves."
    epoch_zh = "i-Epoch：所有配置训练 i 步后只把最好的训练到底（arXiv 2404.04111），由本次曲线计算。"
    if band is None:
        return both(
            f"No random-search band: fewer than four trials had parameters drawn at random. {epoch}",
            f"没有随机搜索区间：随机抽取参数的试验少于四个。{epoch_zh}",
        )
    drawn = f"the searcher's first {band.pool} random trials" if band.startup else f"all {band.pool:,} trials"
    drawn_zh = f"搜索器最初随机抽取的 {band.pool} 个试验" if band.startup else f"全部 {band.pool:,} 个试验"
    small = " It ends where there would be more draws than trials." if band.startup else ""
    small_zh = "抽取次数超过试验数之处不再画出。" if band.startup else ""
    return both(
        f"Band: 400 random searches drawn with replacement from {drawn} (seeded), each trial at the cost of a whole one; "
        f"one that was stopped counts with its last value.{small} {epoch}",
        f"区间：从{drawn_zh}中有放回抽取 400 次随机搜索（固定种子），每个试验按完整成本计；被提前停止的按其最后值计。{small_zh}{epoch_zh}",
    )


def _curse(history: History, found: Sequence[Rerun]) -> str:
    tall, left = 30, 150
    values = [v for one in found for v in (one.searched, *one.fresh, one.low, one.high) if math.isfinite(v)]
    area = frame(values, [0, 1], height=tall * len(found) + 66, left=left, bottom=46)
    body = [grid(area, plain(history.metric), "", y_ticks=False)]
    for row, one in enumerate(found):
        y = area.top + tall * (row + 0.5)
        searched, mean = area.across(one.searched), area.across(one.mean)
        body.append(f'<text x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{plain(one.trial.config)}</text>')
        body.append(f'<line class="grid" x1="{left}" x2="{area.width - area.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<line class="curse" x1="{searched:.1f}" x2="{mean:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body += [
            f'<line class="speck" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 5:.1f}" y2="{y + 5:.1f}"/>'
            for x in map(area.across, one.fresh)
        ]
        if math.isfinite(one.low):
            low, high = area.across(one.low), area.across(one.high)
            body.append(f'<line class="interval" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        title = f"search {number(one.searched)}, fresh {number(one.mean)} [{number(one.low)}, {number(one.high)}]"
        body.append(f'<circle class="hollow" cx="{searched:.1f}" cy="{y:.1f}" r="5"><title>{title}</title></circle>')
        body.append(f'<circle class="ours" cx="{mean:.1f}" cy="{y:.1f}" r="5"><title>{title}</title></circle>')
    return picture(area, "search value beside fresh seeds", "".join(body))


def _seed_table(found: Sequence[Rerun]) -> str:
    heads = (
        both("configuration", "配置"),
        both("parameters", "参数"),
        both("search", "搜索值"),
        both("fresh mean", "新种子均值"),
        "95%",
        both("seeds", "种子数"),
        both("flattered by", "高估"),
        both("chance to be best", "最佳概率"),
    )
    rows = [
        (
            plain(one.trial.config),
            f"<code>{plain(', '.join(f'{k}={shown(v)}' for k, v in one.trial.params.items()))}</code>",
            number(one.searched),
            f"<b>{number(one.mean)}</b>",
            f"[{number(one.low)}, {number(one.high)}]" if math.isfinite(one.low) else "–",
            str(len(one.fresh)),
            number(abs(one.curse)) if abs(one.curse) > 0 else "0",
            "–" if one.chance is None else f"{one.chance:.0%}",
        )
        for one in found
    ]
    return table(heads, rows, numbers=(2, 3, 4, 5, 6, 7))


def _hours(unit: str) -> str:
    return "卡时" if unit == "card-hours" else "试验小时"


def _nothing() -> str:
    return f"<p class=note>{both('no trial has ended with a value yet', '还没有试验得到结果')}</p>"

"""The tables of a sweep's page: what it cost, what broke and why, the hundred best."""

from __future__ import annotations

from collections.abc import Sequence

from tigerbot_jobs.demo.figures import short
from tigerbot_jobs.shown import money as written
from tigerbot_jobs.sweep.analysis import History
from tigerbot_jobs.sweep.analysis_axes import Axis, shown
from tigerbot_jobs.sweep.analysis_cost import Spent, cost_to_close, failures, hours_unit, money, spent
from tigerbot_jobs.sweep.analysis_search import counts_cards
from tigerbot_jobs.sweep.page_drawing import both, number, plain, table

BEST = 100
_CHINESE = {
    "done": "完成",
    "taken over": "被接管前",
    "stopped": "提前停止",
    "fresh seeds": "新种子重跑",
    "failed": "失败",
    "killed": "被终止",
    "retried": "失败后重试",
    "cut short": "驱动中断",
    "running": "运行中",
}


def cost_section(history: History) -> str:
    """One bar, as long as everything that was spent, and its parts as a table."""
    rows = spent(history)
    hours = [_hours(history, row) for row in rows]
    total = sum(hours) or 1.0
    bar = "".join(
        f'<i class="fate {_kind(row.what)}" style="width:{share / total:.3%}" title="{plain(row.what)} {share / total:.1%}"></i>'
        for row, share in zip(rows, hours, strict=True)
    )
    unit = hours_unit(history)
    heads = [
        both("what", "类别"),
        both("trials", "试验"),
        both(unit, "卡时" if unit == "card-hours" else "试验小时"),
        both("share", "占比"),
    ]
    paid = money(history, 1.0) is not None
    all_money = money(history, sum(row.card_hours for row in rows)) or 0.0
    heads += [both("money", "费用")] if paid else []
    cells = []
    for row, amount in zip(rows, hours, strict=True):
        name = both(plain(row.what), _CHINESE.get(row.what, plain(row.what)))
        cost = [written(money(history, row.card_hours) or 0.0, all_money)] if paid else []
        cells.append(
            (
                f'<i class="mark {_kind(row.what)}"></i>{name}',
                f"{row.trials:,}",
                _short(amount),
                f"{amount / total:.1%}",
                *cost,
            )
        )
    whole = [both("together", "合计"), f"{len(history.trials):,}", _short(sum(hours)), "100%"]
    cells.append([f"<b>{cell}</b>" for cell in [*whole, *([written(all_money, all_money)] if paid else [])]])
    return (
        f"<div class=fates role=presentation>{bar}</div>" + table(heads, cells, numbers=range(1, 5)) + _close(history)
    )


def failures_section(history: History) -> str:
    found = failures(history)
    if not found:
        return f"<p class=note>{both('no attempt failed', '没有失败')}</p>"
    heads = (
        both("cause", "原因"),
        both("attempts", "次数"),
        both("trials", "试验"),
        both("went well later", "重试后成功"),
        both("card-hours", "卡时"),
        both("first of them", "首例"),
    )
    rows = [
        (
            f"<b>{plain(one.cause)}</b>",
            f"{one.attempts:,}",
            f"{one.trials:,}",
            f"{one.recovered:,}",
            _short(one.card_hours),
            f"{plain(one.example)}<br><code>{plain(one.error[:300]) or '–'}</code>",
        )
        for one in found
    ]
    return table(heads, rows, numbers=(1, 2, 3, 4))


def best_section(history: History, axes: Sequence[Axis]) -> str:
    """The hundred best by their value in the search."""
    found = history.best(BEST)
    if not found:
        return ""
    heads = (
        "",
        both("trial", "试验"),
        plain(history.metric),
        *(plain(axis.name) for axis in axes),
        both("state", "状态"),
        both("seconds", "秒"),
    )
    rows = [
        (
            f"{rank}",
            plain(trial.name),
            number(trial.metric),
            *(plain(shown(trial.params[axis.name])) if axis.name in trial.params else "–" for axis in axes),
            plain(trial.status),
            f"{trial.seconds:,.1f}",
        )
        for rank, trial in enumerate(found, 1)
    ]
    name = both(
        f"the {len(found)} best of {len(history.searched):,}", f"{len(history.searched):,} 个中最好的 {len(found)} 个"
    )
    listed = table(heads, rows, numbers=(0, 2, *range(3, 3 + len(axes)), len(heads) - 1))
    return f"<details><summary>{name}</summary>{listed}</details>"


def _close(history: History) -> str:
    close = cost_to_close(history)
    if close is None or not close[1]:
        return ""
    unit = hours_unit(history)
    said = both(
        f"The best so far came within 1% of the final best after {short(close[0])} of {short(close[1])} {unit}.",
        f"花费 {short(close[0])} / {short(close[1])}（{unit}）时，最佳值已在最终最佳的 1% 以内。",
    )
    return f"<p class=note>{said}</p>"


def _hours(history: History, row: Spent) -> float:
    return row.card_hours if counts_cards(history) else row.hours


def _kind(what: str) -> str:
    return "fate-" + what.replace(" ", "-") if what in _CHINESE else "fate-other"


def _short(hours: float) -> str:
    return f"{hours:,.2f}" if hours >= 1 else f"{hours:.4f}"

"""What to do next, from what a sweep showed: each piece of advice with the number that it rests on."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from tigerbot_jobs.demo.figures import short
from tigerbot_jobs.sweep.analysis import History
from tigerbot_jobs.sweep.analysis_axes import Axis, shown
from tigerbot_jobs.sweep.analysis_cost import cost_to_close, failures, hours_unit
from tigerbot_jobs.sweep.analysis_importance import Importance
from tigerbot_jobs.sweep.analysis_seeds import Recommendation, noise, reruns
from tigerbot_jobs.sweep.page_drawing import both, number, plain

_IDLE = 0.02  # a parameter below this share by both methods can be fixed
_BROKEN = 0.05


def advice(
    history: History,
    found: Recommendation | None,
    axes: Sequence[Axis],
    important: Sequence[Importance],
    objectives: Collection[str],
) -> str:
    """An ordered list, the most useful first."""
    items = [
        *_submit(history, found),
        *_choose(history, objectives),
        *_space(found, axes, _idle(important)),
        *_money(history),
        *_broken(history),
        *_fix(important),
    ]
    return f"<ol class=advice>{''.join(f'<li>{item}</li>' for item in items)}</ol>"


def _submit(history: History, found: Recommendation | None) -> Iterator[str]:
    if found is None:
        yield both("Wait for a trial to end with a value.", "等待试验得到结果。")
        return
    name, value = plain(found.trial.config), number(found.value)
    if found.rerun is None:
        sigma = noise(history)
        spread = "" if sigma is None else f" (σ between seeds {number(sigma)})"
        yield both(
            f"<b>Run the best few configurations with fresh seeds</b> (<code>confirm: {{top: 5, seeds: 5}}</code>) before you "
            f"believe {value} of {name}{spread}: it was chosen for being the best, so it is too good.",
            f"<b>先用新种子重跑最好的几个配置</b>（<code>confirm: {{top: 5, seeds: 5}}</code>），再相信 {name} 的 {value}："
            "它因最好而被选中，所以偏乐观。",
        )
    else:
        low, high, seeds = found.rerun.low, found.rerun.high, len(found.rerun.fresh)
        sure = math.isfinite(low)
        interval = f", 95% [{number(low)}, {number(high)}]" if sure else ""
        interval_zh = f"，95% 区间 [{number(low)}, {number(high)}]" if sure else ""
        count = sum(low <= one.mean <= high for one in reruns(history) if one.trial is not found.trial)
        alike = f" {count} more lie within its interval: take the cheapest of them." if count else ""
        alike_zh = f"另有 {count} 个配置落在其区间内：可选其中最便宜的。" if count else ""
        yield both(
            f"<b>Submit {name}</b>: {plain(history.metric)} {value}{interval}, by {seeds} fresh seed{'' if seeds == 1 else 's'}.{alike}",
            f"<b>提交 {name}</b>：{seeds} 个新种子的 {plain(history.metric)} 为 {value}{interval_zh}。{alike_zh}",
        )


def _choose(history: History, objectives: Collection[str]) -> Iterator[str]:
    if objectives:
        names = plain(", ".join(objectives))
        yield both(
            f"<b>Or choose from the front</b>: the recommendation is by {plain(history.metric)} alone; {names} may be worth more.",
            f"<b>或从前沿中选择</b>：推荐只看 {plain(history.metric)}；{names} 也许更重要。",
        )


def _space(found: Recommendation | None, axes: Sequence[Axis], idle: Sequence[str]) -> Iterator[str]:
    """Parameters that matter and whose best value is at a bound; 0 is a bound that is nobody's choice."""
    near = [(axis, axis.edge(found.trial.params)) for axis in axes] if found is not None else []
    for axis, side in near:
        if side and found is not None and axis.name not in idle and (side == "high" or axis.low != 0):
            value = shown(found.trial.params[axis.name])
            bound = shown(axis.low if side == "low" else axis.high)
            yield both(
                f"<b>Widen {plain(axis.name)}</b>: the best value {plain(value)} lies at the edge of the space ({plain(bound)}).",
                f"<b>放宽 {plain(axis.name)} 的范围</b>：最佳值 {plain(value)} 已在边界（{plain(bound)}）附近。",
            )


def _money(history: History) -> Iterator[str]:
    close = cost_to_close(history)
    if close is not None and close[1] > 0 and close[0] < 0.5 * close[1] and len(history.searched) >= 20:
        share, unit = close[0] / close[1], hours_unit(history)
        yield both(
            f"<b>Spend less next time</b>: within 1% of the best after {share:.0%} of the {short(close[1])} {unit}.",
            f"<b>下次可以少花</b>：用到 {share:.0%} 的预算时已在最佳值的 1% 以内。",
        )


def _broken(history: History) -> Iterator[str]:
    found = failures(history)
    failed = sum(failure.attempts for failure in found)
    if found and failed >= _BROKEN * max(1, len(history.trials)):
        first = found[0]
        error = plain(first.error[:160]) or "–"
        yield both(
            f"<b>Look at {plain(first.cause)}</b>: {first.attempts:,} attempts failed of it; first {plain(first.example)}: "
            f"<code>{error}</code>",
            f"<b>检查 {plain(first.cause)}</b>：{first.attempts:,} 次尝试因此失败；例如 {plain(first.example)}：<code>{error}</code>",
        )


def _fix(important: Sequence[Importance]) -> Iterator[str]:
    idle = _idle(important)
    if idle and len(idle) < len(important):
        names = plain(", ".join(idle[:8]))
        yield both(
            f"<b>Fix {names}</b>: below {_IDLE:.0%} of the importance by both methods; search the others.",
            f"<b>固定 {names}</b>：两种方法下重要性都低于 {_IDLE:.0%}；把搜索留给其他参数。",
        )


def _idle(important: Sequence[Importance]) -> list[str]:
    return [one.name for one in important if one.fanova < _IDLE and one.ped_high < 2 * _IDLE]

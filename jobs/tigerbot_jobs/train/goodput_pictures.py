"""Pictures of a run's time as inline SVG: the whole run, each incident up close, the loss with its rollbacks."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import groupby

from tigerbot_jobs.demo.figures import short
from tigerbot_jobs.shown import clock, span
from tigerbot_jobs.train.goodput import Account, Loss
from tigerbot_jobs.train.timeline import Timeline

COLOURS = {
    "step": "#12876f",
    "recompute": "#d55e00",
    "data_wait": "#56b4e9",
    "checkpoint_block": "#2f6fb0",
    "eval": "#8fb93f",
    "hang_wait": "#c0392b",
    "idle_after_failure": "#7d2b4d",
    "restore": "#e0a100",
    "resize": "#b56cc6",
    "queue": "#c3ccd6",
    "start": "#93a1b0",
    "other": "#66727e",
}
# From one moment of an incident to the next: what went on, and its colour.
PHASES = {
    "unnoticed": COLOURS["hang_wait"],
    "deciding": "#e07b39",
    "waiting for driver or workers": COLOURS["idle_after_failure"],
    "forming the group": COLOURS["resize"],
    "restoring": COLOURS["restore"],
    "first step": "#5fb8a3",
}
WIDTH, LEFT, RIGHT = 960, 58, 12
_SHORTEST_S = 1e-6  # of a run that is drawn
_BINS = 160


def whole_bar(seconds: dict[str, float]) -> str:
    """The run as one bar, each category as long as its share."""
    total, at, parts = sum(seconds.values()) or 1.0, 0.0, ['<svg viewBox="0 0 960 34" role="img">']
    for name in COLOURS:
        width = seconds[name] / total * WIDTH
        if width > 0:
            label = f"{name} {seconds[name] / total:.1%}"
            parts.append(f"<g><title>{label}, {seconds[name]:,.1f} s</title>{_rect(at, 0, width, 34, COLOURS[name])}")
            if width > 7 * len(label):
                parts.append(f'<text class="in" x="{at + 8:.1f}" y="22">{label}</text>')
            parts.append("</g>")
        at += width
    return "".join([*parts, "</svg>"])


def over_time(found: Account) -> str:
    """Shares of each stretch of the run as a stacked bar; incidents above, the number of workers below."""
    line, top, height = found.timeline, 34, 190
    bins, length = _binned(line), max(found.wall_s, _SHORTEST_S) / _BINS
    parts = [f'<svg viewBox="0 0 {WIDTH} {top + height + 72}" role="img" aria-label="categories over time">']
    wide = (WIDTH - LEFT - RIGHT) / _BINS
    for index, shares in enumerate(bins):
        x, y = LEFT + index * wide, float(top + height)
        said = ", ".join(f"{name} {share / length:.0%}" for name, share in shares.items() if share > 0.005 * length)
        parts.append(f"<g><title>{clock(index * length)}: {said}</title>")
        for name in COLOURS:
            tall = shares.get(name, 0.0) / length * height
            if tall > 0.05:
                y -= tall
                parts.append(_rect(x, y, wide + 0.3, tall, COLOURS[name]))
        parts.append("</g>")
    for share in (0, 0.5, 1):
        parts.append(
            f'<text x="{LEFT - 6}" y="{top + height * (1 - share) + 4:.0f}" text-anchor="end">{share:.0%}</text>'
        )
    parts += _markers(found, top)
    parts += _workers(line, found.wall_s, top + height + 12)
    parts += _time_axis(found.wall_s, top + height + 46)
    return "".join([*parts, "</svg>"])


def lane(loss: Loss, end: float) -> str:
    """One incident up close: from its last step to the first new one."""
    incident = loss.incident
    first = incident.first_step_at if incident.first_step_at is not None else end
    start = min(first, incident.down_from or 0.0)
    if incident.last_step_at is not None:
        start = min(first, incident.last_step_at)
    seen = incident.seen_at if incident.mttd_s is not None else None
    moments = [seen, incident.acted_at, incident.generation_at, incident.formed_at, incident.restored_at, first]
    if incident.first_step_at is None:  # what comes after the last thing that happened is going on
        known = [index for index, moment in enumerate(moments[:-1]) if moment is not None]
        moments[max(known, default=-1) + 1] = first
    length = first - start or 1e-3
    scale = (WIDTH - 160) / length
    parts = [f'<svg viewBox="0 0 {WIDTH} 66" role="img" aria-label="incident">', _rect(0, 8, 78, 26, COLOURS["step"])]
    parts.append(_rect(WIDTH - 80, 8, 80, 26, COLOURS["step"] if incident.first_step_at is not None else "#8886"))
    at, shown = start, 75.0
    for name, until in zip(PHASES, moments, strict=True):
        if until is None or until <= at:
            continue
        until = min(until, first)
        x, width = 80 + (at - start) * scale, (until - at) * scale
        parts.append(f"<g><title>{name}: {until - at:.3f} s</title>{_rect(x, 8, max(width, 0.5), 26, PHASES[name])}")
        if width > 52:
            parts.append(
                f'<text class="in" x="{x + width / 2:.1f}" y="25" text-anchor="middle">{until - at:.2f} s</text>'
            )
        parts.append("</g>")
        at = until
        if x + width - shown > 60:
            shown = x + width
            parts.append(f'<line class="tick" x1="{shown:.1f}" x2="{shown:.1f}" y1="34" y2="42"/>')
            parts.append(f'<text x="{shown:.1f}" y="56" text-anchor="middle">+{at - start:.2f} s</text>')
    last = "last step" if incident.last_step_at is not None else "the end"
    parts.append(f'<text x="0" y="56">{last} {clock(start)}</text>')
    parts.append('<text class="in" x="39" y="25" text-anchor="middle">training</text>')
    after = "training" if incident.first_step_at is not None else "not back"
    parts.append(f'<text class="in" x="{WIDTH - 40}" y="25" text-anchor="middle">{after}</text></svg>')
    return "".join(parts)


def loss_curve(rows: Sequence[dict[str, float]], rollbacks: Sequence[tuple[int, int]]) -> str:
    """Loss by step as it was logged: what was undone stays visible, faint. `rollbacks` are (from step, to step)."""
    points = [(row["step"], row["loss"]) for row in rows if math.isfinite(row.get("loss", math.nan))]
    if not points:
        return "<p class=note>no loss was logged</p>"
    kept, undone = _branches(points)
    losses, steps = [y for _, y in points], [x for x, _ in points]
    low, high, right = min(losses), max(losses), max(steps)
    pad, top, bottom = (high - low) * 0.06 or 0.5, 14, 250
    low, high, left = low - pad, high + pad, min(steps)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - left) / ((right - left) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), bottom - (y - low) / (high - low) * (bottom - top)

    parts = [f'<svg viewBox="0 0 {WIDTH} 290" role="img" aria-label="loss over steps">']
    for value in _round(low, high, 5):
        y = place(left, value)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value in _round(left, right, 8):
        parts.append(
            f'<text x="{place(value, low)[0]:.1f}" y="{bottom + 18}" text-anchor="middle">{short(value)}</text>'
        )
    for start, to in rollbacks:
        x0, x1 = place(min(start, right), low)[0], place(max(left, min(to, right)), low)[0]
        parts.append(f"<g><title>rolled back from step {start} to {to}</title>")
        parts.append(
            f'<rect class="back" x="{x1:.1f}" y="{top}" width="{max(1.5, x0 - x1):.1f}" height="{bottom - top}"/>'
        )
        parts.append(f'<text class="mark" x="{(x0 + x1) / 2:.1f}" y="{top - 3}" text-anchor="middle">↩</text></g>')
    for branch in undone:
        parts.append(_path([place(*point) for point in branch], COLOURS["recompute"], 1.4, 0.65))
    parts.append(_path([place(*point) for point in kept], COLOURS["step"], 1.9, 1.0))
    if len(kept) == 1:
        parts.append(
            f'<circle cx="{place(*kept[0])[0]:.1f}" cy="{place(*kept[0])[1]:.1f}" r="3" fill="{COLOURS["step"]}"/>'
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{bottom + 36}" text-anchor="middle">step</text>')
    parts.append(f'<text transform="translate(14 {bottom / 2}) rotate(-90)" text-anchor="middle">loss</text></svg>')
    return "".join(parts)


def _branches(points: list[tuple[float, float]]) -> tuple[list[tuple[float, float]], list[list[tuple[float, float]]]]:
    """The curve that counts, and the ends that a fall of the step number cut off."""
    kept: list[tuple[float, float]] = []
    undone = []
    for point in points:
        cut = len(kept)
        while cut and kept[cut - 1][0] >= point[0]:
            cut -= 1
        if len(kept) > cut:
            undone.append(kept[max(0, cut - 1) :])
        kept = [*kept[:cut], point] if cut < len(kept) else kept
        if not kept or kept[-1] is not point:
            kept.append(point)
    return kept, undone


def _binned(line: Timeline) -> list[dict[str, float]]:
    bins: list[dict[str, float]] = [{} for _ in range(_BINS)]
    length = max(line.end, _SHORTEST_S) / _BINS
    for one in line.spans():
        if one.end <= one.start:
            continue
        for index in range(int(one.start / length), min(_BINS, int(one.end / length) + 1)):
            inside = min(one.end, (index + 1) * length) - max(one.start, index * length)
            if inside > 0:
                for name, seconds in one.shares:
                    bins[index][name] = bins[index].get(name, 0.0) + seconds * inside / (one.end - one.start)
    return bins


def _markers(found: Account, top: int) -> list[str]:
    parts, free = [], -1e9
    for number, loss in enumerate(found.losses, 1):
        x = LEFT + loss.incident.seen_at / (found.wall_s or 1) * (WIDTH - LEFT - RIGHT)
        colour = COLOURS["hang_wait"] if loss.incident.down_from is not None else COLOURS["other"]
        title = html.escape(f"{number}: {loss.incident.kind}, {loss.total_s:.2f} s lost")
        parts.append(
            f'<g><title>{title}</title><path d="M{x - 5:.1f} {top - 12}h10l-5 9z" fill="{colour}"/>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 3}" y2="{top + 190}" stroke="{colour}" stroke-opacity=".55"/>'
        )
        if x - free > 20:
            free = x
            parts.append(f'<text class="mark" x="{x:.1f}" y="{top - 16}" text-anchor="middle">{number}</text>')
        parts.append("</g>")
    return parts


def _workers(line: Timeline, wall_s: float, y: int) -> list[str]:
    """A band that is as dark as there are workers, with a mark at each life of the driver."""
    across = (WIDTH - LEFT - RIGHT) / (wall_s or 1)
    most = max((turn.world_size for turn in line.turns), default=1) or 1
    parts = [f'<text x="{LEFT - 6}" y="{y + 10}" text-anchor="end">workers</text>']
    for (_, _, size), turns in groupby(line.turns, key=lambda t: (t.life, t.generation, t.world_size)):
        stretch = list(turns)
        x, width = LEFT + stretch[0].start * across, (stretch[-1].end - stretch[0].start) * across
        title = f"{size} workers, generation {stretch[0].generation}, {span(stretch[-1].end - stretch[0].start)}"
        shade = f'fill-opacity="{0.2 + 0.6 * size / most:.2f}"'
        parts.append(f"<g><title>{title}</title>{_rect(x, y, max(width, 0.5), 13, '#4a6fa5', shade)}")
        if width > 18:
            parts.append(f'<text class="in" x="{x + width / 2:.1f}" y="{y + 10}" text-anchor="middle">{size}</text>')
        parts.append("</g>")
    free = -1e9
    for number, life in enumerate(line.lives[1:], 2):
        x = LEFT + life.start * across
        parts.append(f'<line class="life" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 6}" y2="{y + 18}"/>')
        if x - free > 55:
            free = x
            parts.append(f'<text x="{x + 3:.1f}" y="{y + 24}">driver {number}</text>')
    return parts


def _time_axis(wall_s: float, y: int) -> list[str]:
    return [
        f'<text x="{LEFT + at / (wall_s or 1) * (WIDTH - LEFT - RIGHT):.1f}" y="{y + 12}" text-anchor="middle">{clock(at)}</text>'
        for at in _round(
            0, wall_s * 0.97, 8, (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200)
        )
    ]


def _round(low: float, high: float, count: int, steps: Sequence[float] = ()) -> list[float]:
    """Some round numbers from low to high; of `steps` where one of them is wide enough."""
    rough = max((high - low) / count, 1e-12)
    power = 10.0 ** math.floor(math.log10(rough))
    decimal = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    step = next((each for each in steps if each >= rough), decimal)
    first = math.ceil(low / step)
    return [step * (first + index) for index in range(4 * count) if step * (first + index) <= high]


def _rect(x: float, y: float, width: float, height: float, colour: str, more: str = "") -> str:
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}" fill="{colour}" {more}/>'


def _path(points: Sequence[tuple[float, float]], colour: str, width: float, opacity: float) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'

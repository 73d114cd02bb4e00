"""Small pictures as inline SVG, so that a report is one file that opens anywhere, offline and in ten years."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe & Ito: colour-blind safe
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 300, 56, 40, 14, 14


@dataclass(frozen=True)
class Series:
    """Named points (x, y); `labels` are shown on hover, `line` joins the points."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    line: bool = True


def chart(series: Sequence[Series], *, x: str, y: str, log_x: bool = False) -> str:
    """An SVG of the series with axes and a legend; an empty note when there is nothing finite to show."""
    kept = [Series(s.name, [p for p in s.points if all(map(math.isfinite, p))], s.labels, s.line) for s in series]
    points = [point for s in kept for point in s.points]
    if not points:
        return "<p>nothing to show</p>"
    across = Scale([p[0] for p in points], LEFT, WIDTH - RIGHT, log=log_x)
    up = Scale([p[1] for p in points], HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y)} over {html.escape(x)}">']
    for value, place in up.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value, place in across.ticks():
        parts.append(f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(value)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x)}</text>')
    parts.append(
        f'<text transform="translate(12 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{html.escape(y)}</text>'
    )
    for index, s in enumerate(kept):
        parts += _drawn(s, COLOURS[index % len(COLOURS)], across, up)
        parts.append(
            f'<rect x="{WIDTH - 24}" y="{TOP + 16 * index}" width="10" height="10" fill="{COLOURS[index % 6]}"/>'
        )
        parts.append(
            f'<text x="{WIDTH - 30}" y="{TOP + 9 + 16 * index}" text-anchor="end">{html.escape(s.name)}</text>'
        )
    return "".join([*parts, "</svg>"])


def heat_map(tokens: Sequence[dict]) -> str:
    """Tokens as text with two layers: p_div above, p_dev below, darker for higher."""
    cells = []
    for token in tokens:
        rows = "".join(
            _cell(token.get(name), colour) for name, colour in (("p_div", "0,114,178"), ("p_dev", "213,94,0"))
        )
        note = ", ".join(f"{name} {token[name]:.2f}" for name in ("p_div", "p_dev", "w") if token.get(name) is not None)
        text = html.escape(token.get("text", "")).replace(" ", "&nbsp;") or "&nbsp;"
        cells.append(f'<span class="token" title="{html.escape(note)}">{text}{rows}</span>')
    return f'<div class="heat">{"".join(cells)}</div>'


def _cell(probability: float | None, colour: str) -> str:
    alpha = 0.0 if probability is None else probability
    return f'<i style="background:rgba({colour},{alpha:.2f})"></i>'


def _drawn(s: Series, colour: str, across: Scale, up: Scale) -> list[str]:
    placed = [(across(x), up(y)) for x, y in s.points]
    parts = []
    if s.line and len(placed) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    if not s.line or len(placed) <= 12:
        for index, (x, y) in enumerate(placed):
            label = (
                html.escape(s.labels[index])
                if index < len(s.labels)
                else f"{s.points[index][0]:.3g}, {s.points[index][1]:.4g}"
            )
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{label}</title></circle>')
    return parts


def short(value: float) -> str:
    """A number in few characters: 1.5M, 20k, 0.35, 2e-05."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size <= abs(value) < 1000 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _round_between(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step)
    return [step * (first + index) for index in range(7) if step * (first + index) <= high]


class Scale:
    """Values to pixels, linear or logarithmic."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, log: bool = False) -> None:
        self.log = log and min(values) > 0
        low, high = (self._in(min(values)), self._in(max(values)))
        pad = (high - low) * 0.04 or abs(low) * 0.05 or 0.5
        self.low, self.high, self.start, self.end = low - pad, high + pad, start, end

    def __call__(self, value: float) -> float:
        return self.start + (self._in(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, float]]:
        """Round values (1, 2 or 5 times a power of ten) with their places."""
        if self.log and self.high - self.low > 1:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            values = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        else:
            low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
            values = _round_between(low, high)
        return [(value, self(value)) for value in values if self.low <= self._in(value) <= self.high]

    def _in(self, value: float) -> float:
        return math.log10(value) if self.log else value

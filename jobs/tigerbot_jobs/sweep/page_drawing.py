"""What the pictures of a sweep's page are drawn with: words in two languages, frames with axes, dots, tables beneath.

Everything that comes from outside goes through `plain`; colours are classes, so that light and dark are the style's.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tigerbot_jobs.demo.figures import Scale, short
from tigerbot_jobs.shown import printable

Point = tuple[float, float]


def plain(text: object) -> str:
    """Text from outside as HTML: on one line, without what moves a cursor, every special character escaped."""
    return html.escape(printable(str(text)))


def both(english: str, chinese: str) -> str:
    """HTML in both languages, of which the page shows one."""
    return f"<span class=en lang=en>{english}</span><span class=zh lang=zh>{chinese}</span>"


def svg_both(english: str, chinese: str) -> str:
    """As `both`, inside a `<text>`."""
    return f'<tspan class="en" lang="en">{english}</tspan><tspan class="zh" lang="zh">{chinese}</tspan>'


@dataclass(frozen=True)
class Frame:
    """A plot area in pixels with a scale for each direction."""

    across: Scale
    up: Scale
    width: int
    height: int
    left: int = 62
    right: int = 14
    top: int = 16
    bottom: int = 44

    def at(self, x: float, y: float) -> Point:
        """Where a value lies, held inside the frame from above and below."""
        return self.across(x), min(self.height - self.bottom, max(self.top, self.up(y)))


def frame(
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    width: int = 960,
    height: int = 330,
    log_x: bool = False,
    left: int = 62,
    bottom: int = 44,
) -> Frame:
    """A frame that holds these values."""
    right, top = 14, 16
    across, up = Scale(xs, left, width - right, log=log_x), Scale(ys, height - bottom, top)
    return Frame(across, up, width, height, left=left, right=right, top=top, bottom=bottom)


def ticks(scale: Scale, most: int) -> list[Point]:
    """At most this many ticks; of a logarithmic scale whole powers of ten where two of them show."""
    found = scale.ticks()
    if len(found) <= most:
        return found
    tens = [one for one in found if scale.log and math.log10(one[0]) == round(math.log10(one[0]))]
    found = tens if len(tens) > 1 else found
    return found[:: math.ceil(len(found) / most)]


def grid(area: Frame, x_name: str, y_name: str, *, most: int = 9, x_ticks: bool = True, y_ticks: bool = True) -> str:
    """Lines, numbers and names of both axes; the names are SVG text content."""
    parts, end = [], area.height - area.bottom
    for value, y in ticks(area.up, 6) if y_ticks else []:
        parts.append(f'<line class="grid" x1="{area.left}" x2="{area.width - area.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{area.left - 7}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    for value, x in ticks(area.across, most) if x_ticks else []:
        parts.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{end}" y2="{end + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{end + 17}" text-anchor="middle">{short(value)}</text>')
    middle = (area.left + area.width - area.right) / 2
    parts.append(f'<text class="name" x="{middle:.0f}" y="{area.height - 7}" text-anchor="middle">{x_name}</text>')
    if y_name:
        turn = f"translate(13 {(area.top + end) / 2:.0f}) rotate(-90)"
        parts.append(f'<text class="name" transform="{turn}" text-anchor="middle">{y_name}</text>')
    return "".join(parts)


def picture(area: Frame, title: str, body: str, extra: str = "") -> str:
    """An SVG with a name for those who do not see it; the title is plain text."""
    return f'<svg viewBox="0 0 {area.width} {area.height}" role="img" aria-label="{plain(title)}" {extra}>{body}</svg>'


def dots(points: Iterable[Point], kind: str) -> str:
    """Any number of dots as one path, a dozen bytes each."""
    path = "".join(f"M{x:.0f} {y:.0f}h0" for x, y in points)
    return f'<path class="dots {kind}" d="{path}"/>' if path else ""


def polyline(points: Iterable[Point]) -> str:
    """The `d` of a path through points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def steps(points: Sequence[Point], until: float) -> str:
    """The `d` of a path that keeps each value until the next: what a best so far looks like."""
    path = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    path += [f"H{x:.1f}V{y:.1f}" for x, y in points[1:]]
    return "".join([*path, f"H{until:.1f}"])


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table of HTML cells; `numbers` are the columns that stand to the right."""
    kinds = [" class=n" if at in numbers else "" for at in range(len(heads))]
    head = "".join(f"<th scope=col{kind}>{name}" for kind, name in zip(kinds, heads, strict=True))
    body = "".join("<tr>" + "".join(f"<td{kind}>{cell}" for kind, cell in zip(kinds, row, strict=True)) for row in rows)
    return f"<div class=scroll><table><tr>{head}{body}</table></div>"


def figure(drawn: str, *, keys: str = "", note: str = "", numbers: str = "") -> str:
    """A picture with its legend, a note, and its numbers as a table for who prefers or needs them."""
    caption = f"<figcaption class=note>{note}</figcaption>" if note else ""
    fold = f"<details><summary>{both('the numbers', '数据表')}</summary>{numbers}</details>" if numbers else ""
    return f"<figure>{keys}{drawn}{caption}{fold}</figure>"


def legend(*entries: tuple[str, str]) -> str:
    """(class of the mark, HTML) pairs."""
    marks = "".join(f'<span><i class="mark {kind}"></i>{name}</span>' for kind, name in entries)
    return f"<div class=keys>{marks}</div>"


def number(value: float | None) -> str:
    """A metric in the page's precision."""
    return "–" if value is None or not math.isfinite(value) else f"{value:,.5g}"

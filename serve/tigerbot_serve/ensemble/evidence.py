"""What the judge doubts and what was found about it: plain data between the engine, the plug-ins and the answer.

A span is a stretch of characters of an answer, never half a character: a character of several byte tokens is as
doubtful as the worst of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # its Summary holds what is defined here
    from tigerbot_serve.engine.request import TokenEvent


@dataclass(frozen=True)
class Span:
    """Characters `start` to `end` of an answer, and the highest p_dev in them."""

    start: int
    end: int
    text: str
    p_dev: float


@dataclass(frozen=True)
class Evidence:
    """A quotation.

    Attributes:
        plugin: who found it.
        source: the document's id within that plug-in.
        text: the words themselves; they stand at `start` to `end` of the source's text.
        weight: how much it is about the question, against the best one found: 0 to 1.
    """

    plugin: str
    source: str
    text: str
    start: int = 0
    end: int = 0
    title: str = ""
    url: str = ""
    weight: float = 1.0


@dataclass(frozen=True)
class Inquiry:
    """What a plug-in is asked: the user's last message, the answer to it, and what is doubted in the answer."""

    question: str
    answer: str
    spans: tuple[Span, ...] = ()


def doubtful_spans(tokens: Sequence[TokenEvent], threshold: float) -> tuple[Span, ...]:
    """The stretches of an answer whose characters are above the threshold; a gap of white space joins two."""
    text = "".join(token.text for token in tokens)
    found: list[Span] = []
    for start, end, p_dev in _characters(tokens):
        if p_dev <= threshold or start == end:
            continue
        if found and not text[found[-1].end : start].strip():
            last = found.pop()
            start, p_dev = last.start, max(p_dev, last.p_dev)
        found.append(Span(start, end, text[start:end], p_dev))
    return tuple(trimmed for span in found if (trimmed := _trimmed(span)).text)


def _characters(tokens: Sequence[TokenEvent]) -> Iterator[tuple[int, int, float]]:
    """(start, end, p_dev) of every piece of text: tokens that held a text back belong to the one that gave it."""
    at, worst = 0, 0.0
    for token in tokens:
        worst = max(worst, token.p_dev or 0.0)
        if token.text:
            yield at, at + len(token.text), worst
            at, worst = at + len(token.text), 0.0


def _trimmed(span: Span) -> Span:
    left = len(span.text) - len(span.text.lstrip())
    text = span.text.strip()
    return Span(span.start + left, span.start + left + len(text), text, span.p_dev)

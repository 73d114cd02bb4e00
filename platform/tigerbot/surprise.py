"""Lingering surprise: the one number beside the hidden state that p_dev reads, on both sides of the house.

u_t = -ln p_factual(y_t | y_<t) is how little the factual member expected a token; lingering surprise is the highest u
of the answer so far, fading by a fifth at each token, so that the second half of a wrong name is as suspect as its
first. Before the answer it is 0. Heads are trained on it and served with it, so it is written down once.
"""

from __future__ import annotations

from collections.abc import Iterable

FADE = 0.8


def linger(before: float, surprise: float) -> float:
    """The lingering surprise after one more token."""
    return max(surprise, FADE * before)


def lingering(surprises: Iterable[float], before: float = 0.0) -> list[float]:
    """The lingering surprise at every token."""
    found = []
    for surprise in surprises:
        before = linger(before, surprise)
        found.append(before)
    return found

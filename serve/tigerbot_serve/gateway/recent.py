"""What answers came to: how creative their tokens were and what the judge said, of all time and of the last minutes.

The past is kept in slices of ten seconds, so that a busy replica keeps no more than an idle one.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

TENTHS = 10
SLICE_S = 10.0


class Weights:
    """Creative weights of tokens, counted by tenths.

    Attributes:
        counts: tokens with w above i / 10 up to (i + 1) / 10; 0 is in the first.
        total: the sum of all w.
    """

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * TENTHS
        self.total = 0.0

    def add(self, w: float) -> None:
        self.counts[max(0, math.ceil(TENTHS * w) - 1)] += 1
        self.total += w

    def merge(self, other: Weights) -> None:
        self.counts = [one + more for one, more in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


@dataclass
class _Slice:
    began: float
    weights: Weights = field(default_factory=Weights)
    verdicts: Counter[str] = field(default_factory=Counter)
    rewrites: int = 0


@dataclass(frozen=True)
class Outcomes:
    """Of the last minutes.

    Attributes:
        w_tenths: tokens given, by their creative weight in tenths (see `Weights`).
        w_mean: the mean of their weights; None of no tokens.
        verdicts: how many held answers had which verdict.
        rewrites: how many rewrites were tried for them, kept or not.
    """

    w_tenths: list[int]
    w_mean: float | None
    verdicts: dict[str, int]
    rewrites: int


class Recent:
    """The slices of the last `window_s` seconds."""

    def __init__(self, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_s, self._clock = window_s, clock
        self._slices: deque[_Slice] = deque()

    def count(self, weights: Weights, verdicts: Iterable[str], rewrites: int) -> None:
        """A request has ended."""
        now = self._clock()
        self._drop(now)
        if not self._slices or now >= self._slices[-1].began + SLICE_S:
            self._slices.append(_Slice(now))
        slice_ = self._slices[-1]
        slice_.weights.merge(weights)
        slice_.verdicts.update(verdicts)
        slice_.rewrites += rewrites

    def reading(self) -> Outcomes:
        self._drop(self._clock())
        weights, verdicts = Weights(), Counter[str]()
        for slice_ in self._slices:
            weights.merge(slice_.weights)
            verdicts.update(slice_.verdicts)
        tokens = sum(weights.counts)
        return Outcomes(
            w_tenths=weights.counts,
            w_mean=weights.total / tokens if tokens else None,
            verdicts=dict(verdicts),
            rewrites=sum(slice_.rewrites for slice_ in self._slices),
        )

    def _drop(self, now: float) -> None:
        while self._slices and self._slices[0].began < now - self._window_s:
            self._slices.popleft()

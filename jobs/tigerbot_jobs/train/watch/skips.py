"""Which global batch a step takes when some batches are skipped: the run's order stays a pure function.

Global batches are numbered from 0 in the run's fixed order. A skip list removes intervals of them; step `n` takes the
n-th batch that is left. So any worker, in any later life of the run, finds the same batch for the same step from the
list alone, and what was trained on before an interval never changes by adding it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class SkipList:
    """Skipped global batches as disjoint intervals, first and last included, in rising order."""

    intervals: tuple[tuple[int, int], ...] = ()

    def add(self, first: int, last: int) -> SkipList:
        """The list with batches `first .. last` skipped as well.

        Raises:
            ValueError: the interval is empty or begins before batch 0.
        """
        if not 0 <= first <= last:
            raise ValueError(f"batches {first} to {last} are no interval")
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self.intervals, (first, last)]):
            if merged and begin <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((begin, end))
        return SkipList(tuple(merged))

    def data_index(self, step: int) -> int:
        """The global batch that step `step` (from 0) takes."""
        index = step
        for first, last in self.intervals:
            if index < first:
                break
            index += last - first + 1
        return index

    def __contains__(self, batch: int) -> bool:
        return any(first <= batch <= last for first, last in self.intervals)

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self.intervals)

    def to_json(self) -> list[list[int]]:
        """As JSON knows it."""
        return [list(interval) for interval in self.intervals]

    @classmethod
    def from_json(cls, intervals: Iterable[Iterable[int]]) -> SkipList:
        """What `to_json` gave, or any intervals in any order."""
        skips = cls()
        for first, last in intervals:
            skips = skips.add(first, last)
        return skips

"""Rows that are the same text: below the first adapted layer the two experts are one model, and one row does for both.

Keys and values of both rows are written all the same, by one copy a layer: a row stays whole by itself, so rows move,
prefixes are kept and one member is skipped without anybody knowing of twins. What is saved is the work.

Legend: R rows of a step, U of them that run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tigerbot_serve.engine.kv_cache import runs_of


@dataclass(frozen=True)
class Twins:
    """Which rows run for all: `keep_U`, rising; `take_R` is the place in it of the row that each row equals; `runs`
    are the stretches [low, high) of neighbouring rows in it."""

    keep_U: Tensor
    take_R: Tensor
    runs: tuple[tuple[int, int], ...]


class TwinFinder:
    """Finds twins, and remembers them while the same rows are stepped."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._of: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._found: Twins | None = None

    def find(self, creative: Sequence[int], factual: Sequence[int]) -> Twins | None:
        """Twins among a step's rows, by the text that each row belongs to; None when there are none."""
        of = tuple(creative), tuple(factual)
        if of != self._of:
            self._of, self._found = of, self._twins(*of)
        return self._found

    def _twins(self, creative: tuple[int, ...], factual: tuple[int, ...]) -> Twins | None:
        place = {text: len(creative) + index for index, text in enumerate(factual)}
        keep = [row for row, text in enumerate(creative) if text not in place] + list(place.values())
        if len(keep) == len(creative) + len(factual):
            return None
        running = {row: index for index, row in enumerate(keep)}
        take = [running[place.get(text, row)] for row, text in enumerate((*creative, *factual))]
        return Twins(torch.tensor(keep, device=self._device), torch.tensor(take, device=self._device), runs_of(keep))

"""Documents to training sequences of one length: best-fit decreasing (Ding et al. 2024, arXiv 2404.10830).

A document is never cut unless it is longer than a sequence, and almost no token is padding. Packing sorts by length,
so the sequences are shuffled afterwards, by seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tigerbot.tokens import Packed


@dataclass(frozen=True)
class Document:
    """Token ids and which of them carry loss; arrays, since lists of a corpus would take ten times the memory."""

    ids: Sequence[int] | np.ndarray
    loss: Sequence[bool] | np.ndarray


def pack(documents: Iterable[Document], length: int, *, pad_id: int, seed: int = 1) -> list[Packed]:
    """Sequences of exactly `length` tokens that hold every token of every document once."""
    pieces = sorted((piece for document in documents for piece in _chunks(document, length)), key=lambda p: -len(p.ids))
    sequences = [_joined(pieces, places, length, pad_id) for places in best_fit([len(p.ids) for p in pieces], length)]
    random.Random(f"pack-{seed}").shuffle(sequences)
    return sequences


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `sizes` (descending): each goes where the least space is left that still holds it.

    O(n): open bins are grouped by free space, and a bit mask over the groups finds the smallest that fits.
    """
    bins: list[list[int]] = []
    by_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_groups = 0
    for index, size in enumerate(sizes):
        fitting = open_groups >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            chosen = by_free[free].pop()
            if not by_free[free]:
                open_groups &= ~(1 << free)
        else:
            free, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        left = free - size
        if left:
            by_free[left].append(chosen)
            open_groups |= 1 << left
    return bins


def _chunks(document: Document, length: int) -> Iterator[Document]:
    for start in range(0, len(document.ids), length):
        yield Document(document.ids[start : start + length], document.loss[start : start + length])


def _joined(pieces: Sequence[Document], places: Sequence[int], length: int, pad_id: int) -> Packed:
    ids = np.full(length, pad_id, dtype=np.int64)
    loss, starts = np.zeros(length, dtype=bool), np.zeros(length, dtype=bool)
    at = 0
    for place in places:
        piece = pieces[place]
        end = at + len(piece.ids)
        ids[at:end], loss[at:end], starts[at] = piece.ids, piece.loss, True
        at = end
    return Packed(ids, loss, starts)

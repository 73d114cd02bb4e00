"""Where a parameter's values lie in the server's flat vector, and the pieces that ranks send of it.

A piece is `(parameter, start, numel)` of the flattened parameter: islands of another world size or ZeRO stage cut the
same parameters elsewhere. Every parameter begins at a block of the quantiser, so that a piece's scales are known from
its start alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tigerbot_jobs.train.islands.quantise import BLOCK, Codes, blocks, restore


@dataclass(frozen=True)
class Piece:
    name: str
    start: int
    numel: int


class Layout:
    """Parameters (name: number of values) in one flat vector, by name.

    Attributes:
        size: of the flat vector, with the gaps between parameters.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = {name: int(sizes[name]) for name in sorted(sizes)}
        self._begin: dict[str, int] = {}
        self.size = 0
        for name, size in self.sizes.items():
            self._begin[name] = self.size
            self.size += blocks(size) * BLOCK

    def of(self, name: str) -> slice:
        return slice(self._begin[name], self._begin[name] + self.sizes[name])

    def place(self, piece: Piece) -> slice:
        """Raises: ValueError: there is no such part of the model."""
        size = self.sizes.get(piece.name)
        if size is None or piece.start < 0 or piece.numel < 1 or piece.start + piece.numel > size:
            raise ValueError(f"{piece.name}[{piece.start}:+{piece.numel}] is not a part of this model")
        begin = self._begin[piece.name] + piece.start
        return slice(begin, begin + piece.numel)

    def scatter(self, vector: np.ndarray, pieces: Sequence[Piece], values: np.ndarray) -> None:
        """Put the values of pieces, one after another, where they belong."""
        at = 0
        for piece in pieces:
            vector[self.place(piece)] = values[at : at + piece.numel]
            at += piece.numel

    def gather(self, vector: np.ndarray, pieces: Sequence[Piece]) -> np.ndarray:
        return np.concatenate([vector[self.place(piece)] for piece in pieces])

    def gather_codes(self, found: Codes, pieces: Sequence[Piece]) -> Codes:
        """The codes of pieces, and for each piece the scales of the blocks it touches."""
        places = [self.place(piece) for piece in pieces]
        scales = [found.scales[place.start // BLOCK : blocks(place.stop)] for place in places]
        return Codes(np.concatenate([found.codes[place] for place in places]), np.concatenate(scales))


def total(pieces: Iterable[Piece]) -> int:
    return sum(piece.numel for piece in pieces)


def scales_of(pieces: Iterable[Piece]) -> int:
    """How many scales `gather_codes` gives for these pieces."""
    return sum(blocks(piece.start + piece.numel) - piece.start // BLOCK for piece in pieces)


def restore_pieces(found: Codes, pieces: Sequence[Piece]) -> np.ndarray:
    """The values that `gather_codes` packed."""
    parts, code, scale = [], 0, 0
    for piece in pieces:
        touched = blocks(piece.start + piece.numel) - piece.start // BLOCK
        part = Codes(found.codes[code : code + piece.numel], found.scales[scale : scale + touched])
        parts.append(restore(part, piece.start % BLOCK))
        code, scale = code + piece.numel, scale + touched
    return np.concatenate(parts)


def covers(sizes: Mapping[str, int], pieces: Iterable[Piece]) -> bool:
    """Whether the pieces make up every parameter exactly: no gap, no overlap."""
    reached = dict.fromkeys(sizes, 0)
    for piece in sorted(pieces, key=lambda piece: (piece.name, piece.start)):
        if reached.get(piece.name) != piece.start:
            return False
        reached[piece.name] += piece.numel
    return reached == dict(sizes)

"""Deltas as int8 with one float32 scale a block: 1.016 bytes a value, with the rounding carried to the next round.

Error feedback (Seide et al. 2014; Karimireddy et al. 2019): what rounding took from this round's delta is added to the
next one's, so that over the rounds nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BLOCK = 256
_MOST = np.float32(127)


@dataclass(frozen=True)
class Codes:
    """`codes` int8, one a value; `scales` float32, one a block (the last block may be short)."""

    codes: np.ndarray
    scales: np.ndarray


def blocks(values: int) -> int:
    return -(-values // BLOCK)


def quantise(values: np.ndarray) -> Codes:
    """Nearest codes; a block's largest value is met. What is not finite makes its block's scale not finite."""
    padded = np.zeros(blocks(len(values)) * BLOCK, np.float32)
    padded[: len(values)] = values
    rows = padded.reshape(-1, BLOCK)
    scales = np.abs(rows).max(axis=1, initial=0) / _MOST
    # A scale below the normal numbers has too few bits to divide by: such a block is nothing.
    scales[scales < np.finfo(np.float32).tiny] = 0
    divisor = np.where((scales > 0) & np.isfinite(scales), scales, np.float32(1))
    with np.errstate(invalid="ignore", over="ignore"):
        codes = np.nan_to_num(np.clip(np.rint(rows / divisor[:, None]), -_MOST, _MOST)).astype(np.int8)
    codes[scales == 0] = 0
    return Codes(codes.reshape(-1)[: len(values)].copy(), scales)


def restore(found: Codes, first: int = 0) -> np.ndarray:
    """The values, float32. `first`: the place of the first code in its block."""
    block_of = (np.arange(first, first + len(found.codes)) // BLOCK) if first else None
    if block_of is not None:
        return found.codes * found.scales[block_of]
    return found.codes * np.repeat(found.scales, BLOCK)[: len(found.codes)]


def with_feedback(values: np.ndarray, carried: np.ndarray) -> tuple[Codes, np.ndarray]:
    """Codes of `values + carried`, and what they leave out."""
    wanted = values + carried
    codes = quantise(wanted)
    return codes, wanted - restore(codes)

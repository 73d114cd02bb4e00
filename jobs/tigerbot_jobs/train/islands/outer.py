"""The outer optimizer of DiLoCo (arXiv 2311.08105): SGD with Nesterov momentum on what the islands changed.

Flat float32 vectors in, changed in place. An island's delta is `global at the round's start - its weights now`, so
that it is used like a gradient. This module knows nothing about names, islands or networks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mean(deltas: Sequence[np.ndarray]) -> np.ndarray:
    """Their mean, added up in the order given: the same order gives the same bits."""
    total = deltas[0].copy()
    for delta in deltas[1:]:
        total += delta
    total /= np.float32(len(deltas))
    return total


def change(gradient: np.ndarray, momentum: np.ndarray, *, lr: float, mu: float) -> np.ndarray:
    """What to add to the weights; `momentum` becomes the new one (torch.optim.SGD with nesterov=True)."""
    momentum *= np.float32(mu)
    momentum += gradient
    return np.float32(-lr) * (gradient + np.float32(mu) * momentum)

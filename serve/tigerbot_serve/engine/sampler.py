"""From log-probabilities to one token a row. It knows nothing about where they come from.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def sample(
    logprobs_RV: Tensor,
    temperature_R: Tensor,
    top_p: Sequence[float],
    uniform_R: Tensor,
    floor: float = 0.0,
) -> Tensor:
    """Token ids (R,) by inverse transform: `uniform_R` in [0, 1), float64, decides, so a row's seed is its text.

    Args:
        logprobs_RV: natural log-probabilities, float32.
        temperature_R: 0 takes the most likely token.
        top_p: nucleus of each row; rows at 1 are not sorted.
        floor: tokens less likely than this share of the row's best are dropped, before temperature.
    """
    best_R1, greedy_R1 = logprobs_RV.max(dim=-1, keepdim=True)
    if not bool((temperature_R > 0).any()):
        return greedy_R1[:, 0]
    shifted_RV = logprobs_RV - best_R1
    scaled_RV = shifted_RV / temperature_R.clamp(min=1e-3)[:, None]
    if floor > 0:
        scaled_RV.masked_fill_(shifted_RV < math.log(floor), -math.inf)
    weights_RV = scaled_RV.exp_()
    rows = [row for row, share in enumerate(top_p) if share < 1]
    if rows:
        shares_R = torch.tensor([top_p[row] for row in rows], device=logprobs_RV.device)
        weights_RV[rows] = _nucleus(weights_RV[rows], shares_R)
    # float64: a 32K-token cumulative sum in float32 loses the tail.
    cumulative_RV = weights_RV.cumsum(dim=-1, dtype=torch.float64)
    point_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
    drawn_R1 = torch.searchsorted(cumulative_RV, point_R1, right=True).clamp_(max=logprobs_RV.shape[-1] - 1)
    return torch.where(temperature_R[:, None] > 0, drawn_R1, greedy_R1)[:, 0]


def _nucleus(weights_RV: Tensor, share_R: Tensor) -> Tensor:
    """Weights with everything outside the smallest set of at least `share` of the mass at zero."""
    sorted_RV, order_RV = weights_RV.sort(dim=-1, descending=True)
    before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
    outside_RV = before_RV >= share_R[:, None] * sorted_RV.sum(dim=-1, keepdim=True)
    outside_RV[:, 0] = False
    return torch.zeros_like(weights_RV).scatter_(1, order_RV, sorted_RV.masked_fill_(outside_RV, 0.0))

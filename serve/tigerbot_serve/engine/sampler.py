"""From scores to one token a row: temperature, masks, nucleus, draw. It knows nothing about where scores come from.

In this order: temperature, plausibility mask (of the scores before temperature), min_p, top_k, top_p. The most likely
token passes all of them, so there is always one to draw.

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
    *,
    top_k: Sequence[int] = (),
    min_p: Sequence[float] = (),
) -> Tensor:
    """Token ids (R,) by inverse transform: `uniform_R` in [0, 1), float64, decides, so a row's seed is its text.

    Args:
        logprobs_RV: natural logs up to a constant a row, float32; -inf is never drawn, and no row is all -inf.
        temperature_R: 0 takes the most likely token.
        top_p: nucleus of each row; rows at 1 are not sorted.
        floor: tokens less likely than this share of the row's best are dropped, before temperature.
        top_k: how many of each row's best stay, 0 for all.
        min_p: after temperature, tokens less likely than this share of the row's best are dropped.
    """
    greedy_R = logprobs_RV.argmax(dim=-1)
    if not bool((temperature_R > 0).any()):
        return greedy_R
    weights_RV = weigh(logprobs_RV, temperature_R, top_p, floor, top_k=top_k, min_p=min_p)
    return torch.where(temperature_R > 0, draw(weights_RV, uniform_R), greedy_R)


def weigh(
    logprobs_RV: Tensor,
    temperature_R: Tensor,
    top_p: Sequence[float],
    floor: float = 0.0,
    *,
    top_k: Sequence[int] = (),
    min_p: Sequence[float] = (),
) -> Tensor:
    """What `sample` draws from: weights (R, V), not normalised, the best of a row at 1."""
    shifted_RV = logprobs_RV - logprobs_RV.max(dim=-1, keepdim=True).values
    scaled_RV = shifted_RV / temperature_R.clamp(min=1e-3)[:, None]
    if floor > 0:
        scaled_RV.masked_fill_(shifted_RV < math.log(floor), -math.inf)
    if any(min_p):
        shares_R1 = torch.tensor(min_p, device=scaled_RV.device)[:, None]
        scaled_RV.masked_fill_(scaled_RV < shares_R1.log(), -math.inf)
    weights_RV = scaled_RV.exp_()
    for row, count in enumerate(top_k):
        if 0 < count < weights_RV.shape[-1]:
            least = weights_RV[row].topk(count).values[-1]
            weights_RV[row].masked_fill_(weights_RV[row] < least, 0.0)
    rows = [row for row, share in enumerate(top_p) if share < 1]
    if rows:
        shares_R = torch.tensor([top_p[row] for row in rows], device=logprobs_RV.device)
        weights_RV[rows] = _nucleus(weights_RV[rows], shares_R)
    return weights_RV


def draw(weights_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Token ids (R,): the first whose cumulative weight passes `uniform` of the whole."""
    # float64: a 32K-token cumulative sum in float32 loses the tail.
    cumulative_RV = weights_RV.cumsum(dim=-1, dtype=torch.float64)
    total_R1 = cumulative_RV[:, -1:]
    # Rounded up to the whole, the point would lie behind the last token that has a weight.
    point_R1 = torch.minimum(uniform_R[:, None] * total_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    return torch.searchsorted(cumulative_RV, point_R1, right=True)[:, 0]


def _nucleus(weights_RV: Tensor, share_R: Tensor) -> Tensor:
    """Weights with everything outside the smallest set of at least `share` of the mass at zero."""
    sorted_RV, order_RV = weights_RV.sort(dim=-1, descending=True)
    before_RV = sorted_RV.cumsum(dim=-1) - sorted_RV
    outside_RV = before_RV >= share_R[:, None] * sorted_RV.sum(dim=-1, keepdim=True)
    outside_RV[:, 0] = False
    return torch.zeros_like(weights_RV).scatter_(1, order_RV, sorted_RV.masked_fill_(outside_RV, 0.0))

"""What one member's distribution alone makes certain about the linear mixture, and how to draw without knowing more.

The mixture r = (1 - o) q + o p holds at least (1 - o) q(v) of every token v, whatever the other member says. With a
temperature T <= 1 in the end, r(v)^(1/T) over its sum is at least

    l(v) = ((1 - o) q(v))^(1/T) / ((1 - o) |q| + o)^(1/T)

where |q| is the (1/T)-norm: Minkowski's inequality bounds the sum, and |p| <= 1. So a uniform draw below sum(l) is decided
by q alone, exactly: it takes a token from l; and a draw above it takes one from r - l, for which the other member is
asked. Where o or T are known as a range only, its worst end bounds the rest.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tigerbot_serve.engine.sampler import draw


def certain(own_RV: Tensor, other_R: Tensor, coolest_R: Tensor, hottest_R: Tensor, floor: float = 0.0) -> Tensor:
    """Lower bounds (R, V), float64, of the probabilities that the linear mixture's tokens are drawn with.

    Args:
        own_RV: natural log-probabilities of the member that ran.
        other_R: the most weight that the other may have.
        coolest_R, hottest_R: between them lies the temperature. Above 1 nothing is certain; 0 throughout is greedy.
        floor: of the plausibility mask: only tokens that pass it for certain count.
    """
    q_RV = own_RV.double().exp()
    o_R1, rest_R1 = other_R.double()[:, None], 1 - other_R.double()[:, None]
    best_RK, best_ids_RK = q_RV.topk(2, dim=-1)
    # Greedy: the other member's whole weight on the second best token must not lift it above the best.
    wins_R = rest_R1[:, 0] * (best_RK[:, 0] - best_RK[:, 1]) > o_R1[:, 0]
    greedy_RV = torch.zeros_like(q_RV).scatter_(1, best_ids_RK[:, :1], wins_R.double()[:, None])
    least_R1 = coolest_R.double().clamp(min=1e-3)[:, None]
    most_R1 = hottest_R.double().clamp(min=1e-3)[:, None]
    norm_R1 = (own_RV.double() / most_R1).logsumexp(dim=-1, keepdim=True).mul(most_R1).exp()
    whole_R1 = (rest_R1 * norm_R1 + o_R1).log() / most_R1
    bound_RV = ((own_RV.double() + rest_R1.log()) / least_R1 - whole_R1).exp()
    if floor > 0:
        kept_RV = rest_R1 * q_RV >= floor * (rest_R1 * best_RK[:, :1] + o_R1)
        bound_RV = bound_RV * kept_RV
    bound_RV = bound_RV * ((hottest_R <= 1) & (coolest_R > 0))[:, None]
    return torch.where((hottest_R <= 0)[:, None], greedy_RV, bound_RV)


def coupled(certain_RV: Tensor, target_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Token ids (R,) distributed as `target`; where `uniform` is below the certain share, `certain` alone decides.

    Args:
        certain_RV: lower bounds of `target`.
        target_RV: probabilities.
        uniform_R: in [0, 1), float64.
    """
    share_R = certain_RV.sum(dim=-1)
    left_RV = (target_RV - certain_RV).clamp(min=0)
    nothing_R = left_RV.sum(dim=-1) <= 1e-12  # rounding ate it
    left_RV = torch.where(nothing_R[:, None], target_RV, left_RV)
    asked_R = ((uniform_R - share_R) / (1 - share_R).clamp(min=1e-12)).clamp(0, 1)
    return torch.where(uniform_R < share_R, decided(certain_RV, uniform_R), draw(left_RV, asked_R))


def decided(certain_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The tokens that draws below the certain share take; of rows where it is not, the ids mean nothing."""
    share_R = certain_RV.sum(dim=-1).clamp(min=1e-300)
    return draw(certain_RV, (uniform_R / share_R).clamp(max=1)).clamp(max=certain_RV.shape[-1] - 1)

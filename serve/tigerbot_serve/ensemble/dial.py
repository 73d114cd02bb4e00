"""The dial: how much of each member is in the next token. Small on purpose: replace it with your own rule.

    w = sigmoid(logit(dial) + a logit(p_div) - b logit(p_dev))

At 0 and 1 it is exactly the factual and the creative member: the ends are chosen, not computed.

Legend: R rows, d hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tigerbot.spec import DialSpec

_EDGE = 1e-4  # heads saturate; their logit must not


def creative_weight(dial_R: Tensor, p_div_R: Tensor | None, p_dev_R: Tensor | None, spec: DialSpec) -> Tensor:
    """The creative member's weight (R,). More room for ideas raises it, more risk of a wrong fact lowers it."""
    logit_R = torch.logit(dial_R)  # -inf and +inf at the ends: nothing below moves them
    if p_div_R is not None:
        logit_R = logit_R + spec.a * torch.logit(p_div_R, eps=_EDGE)
    if p_dev_R is not None:
        logit_R = logit_R - spec.b * torch.logit(p_dev_R, eps=_EDGE)
    return torch.sigmoid(logit_R)


def mix(creative_RV: Tensor, factual_RV: Tensor, w_R: Tensor, spec: DialSpec) -> Tensor:
    """Natural log-probabilities of the mixture (R, V).

    Geometric: both must accept a token. Linear: either may propose it.
    """
    w_R1 = w_R[:, None]
    if spec.mix == "geometric":
        # The members' normalisers do not depend on the token, so normalising once at the end is enough.
        mixed_RV = torch.log_softmax(torch.lerp(factual_RV, creative_RV, w_R1), dim=-1)
    else:
        mixed_RV = torch.logaddexp(creative_RV + w_R1.log(), factual_RV + (1 - w_R1).log())
    ends_R1 = (w_R1 <= 0) | (w_R1 >= 1)
    if bool(ends_R1.any()):
        mixed_RV = torch.where(ends_R1, torch.where(w_R1 <= 0, factual_RV, creative_RV), mixed_RV)
    return mixed_RV


def mix_states(creative_Rd: Tensor, factual_Rd: Tensor, w_R: Tensor, spec: DialSpec) -> Tensor | None:
    """The mixture before an output matrix W that both members share, None where the rule has no such form.

    log p = W h - log Z, and a geometric mixture is normalised anyway: w log p_c + (1 - w) log p_f is W of the mixed
    state up to a constant, so one product and one softmax do for two. A rule of your own returns None here.
    """
    if spec.mix != "geometric":
        return None
    w_R1 = w_R[:, None].to(creative_Rd.dtype)
    mixed_Rd = torch.lerp(factual_Rd, creative_Rd, w_R1)
    return torch.where(w_R1 <= 0, factual_Rd, torch.where(w_R1 >= 1, creative_Rd, mixed_Rd))


def temperature(w_R: Tensor, given_R: Tensor, spec: DialSpec) -> Tensor:
    """The temperature (R,): the request's own, or between the two of the spec by the same w (`given` is NaN)."""
    tied_R = (1 - w_R) * spec.temperature_factual + w_R * spec.temperature_creative
    return torch.where(given_R.isnan(), tied_R, given_R)

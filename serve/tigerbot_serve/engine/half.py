"""What can be said of the next token while only one member has run: its head, and w under an assumption for the other.

Legend: R rows, d hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.ensemble.dial import creative_weight
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL
from tigerbot_serve.ensemble.mixture import Mixture


def first_side(sequence: Sequence) -> int:
    """The member with the larger share of the dial: the one that runs first."""
    return CREATIVE if sequence.dial >= 0.5 else FACTUAL


def read_head(mixture: Mixture, side: int, hidden_Rd: Tensor, surprises: Many[float]) -> Tensor | None:
    """A side's probabilities (R,): p_div of the creative one, p_dev of the factual one; None without heads."""
    if mixture.heads is None:
        return None
    if side == CREATIVE:
        return mixture.heads.p_div(hidden_Rd)
    surprise_R1 = torch.tensor(surprises, dtype=torch.float32, device=hidden_Rd.device)[:, None]
    return mixture.heads.p_dev(torch.cat([hidden_Rd.float(), surprise_R1], dim=1))


def weight(mixture: Mixture, side: int, dial_R: Tensor, p_R: Tensor | None, other: float) -> Tensor:
    """The creative weight (R,) where the other member's head would say `other`."""
    if p_R is None:
        return dial_R
    other_R = torch.full_like(p_R, other)
    both = (p_R, other_R) if side == CREATIVE else (other_R, p_R)
    return creative_weight(dial_R, *both, mixture.spec)


def given_temperatures(sequences: Many[Sequence], device: torch.device) -> Tensor:
    """The requests' own temperatures (R,), NaN where the dial's is taken."""
    given = [math.nan if sequence.temperature is None else sequence.temperature for sequence in sequences]
    return torch.tensor(given, dtype=torch.float32, device=device)

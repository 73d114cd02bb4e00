"""The next token's distribution: members' states in, one mixed row of log-probabilities a sequence out.

This is where members, heads and dial meet. It knows nothing about sequences, slots or sampling.

Legend: R sequences of the step, C and F rows of the creative and the factual side, X either, d hidden width,
e = d + 1 numbers that p_dev reads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tigerbot.spec import DialSpec
from tigerbot_serve.ensemble.dial import creative_weight, mix, temperature
from tigerbot_serve.ensemble.heads import Heads
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL, Members


class Plan:
    """What stays the same while the same sequences are stepped together, as tensors made once.

    Args:
        dials, temperatures: of each sequence; a temperature of None is tied to the dial.
        top_p: of each sequence.
        rows: each sequence's row among its side's states, for both sides; None where that member does not run.
    """

    def __init__(
        self,
        dials: Sequence[float],
        temperatures: Sequence[float | None],
        top_p: Sequence[float],
        rows: tuple[Sequence[int | None], Sequence[int | None]],
        device: str = "cpu",
    ) -> None:
        self.dial_R = torch.tensor(dials, dtype=torch.float32, device=device)
        given = [math.nan if value is None else value for value in temperatures]
        self.temperature_R = torch.tensor(given, dtype=torch.float32, device=device)
        self.top_p = list(top_p)
        self.order_R = [_order(side, device) for side in rows]
        self.absent_R = [_absent(side, device) for side in rows]


@dataclass(frozen=True)
class Mixed:
    """Log-probabilities before temperature, mask and top-p; NaN stands for a probability that nobody read.

    `factual_RV` are the factual member's own, None where it ran for no sequence.
    """

    logprobs_RV: Tensor
    factual_RV: Tensor | None
    w_R: Tensor
    temperature_R: Tensor
    p_div_R: Tensor
    p_dev_R: Tensor


class Mixture:
    """Members, their heads and the dial's rule."""

    def __init__(self, members: Members, heads: Heads | None, spec: DialSpec) -> None:
        self.members, self.heads, self.spec = members, heads, spec

    def next(self, creative_Cd: Tensor | None, factual_Fd: Tensor | None, surprise_R: Tensor, plan: Plan) -> Mixed:
        """The mixture at every sequence's last state; `surprise_R` is the lingering surprise of its last token."""
        p_div_R = p_dev_R = None
        if self.heads is not None and creative_Cd is not None:
            p_div_R = _present(
                self.heads.p_div(_in_order(creative_Cd, plan.order_R[CREATIVE])), plan.absent_R[CREATIVE]
            )
        if self.heads is not None and factual_Fd is not None:
            read_Re = torch.cat([_in_order(factual_Fd, plan.order_R[FACTUAL]).float(), surprise_R[:, None]], dim=1)
            p_dev_R = _present(self.heads.p_dev(read_Re), plan.absent_R[FACTUAL])
        w_R = plan.dial_R
        if not self.members.alone:
            w_R = creative_weight(plan.dial_R, _or_neutral(p_div_R), _or_neutral(p_dev_R), self.spec)
        creative_RV = self._log_probabilities(CREATIVE, creative_Cd, plan)
        factual_RV = self._log_probabilities(FACTUAL, factual_Fd, plan)
        if creative_RV is None or factual_RV is None:
            logprobs_RV = factual_RV if creative_RV is None else creative_RV
            assert logprobs_RV is not None
        else:
            logprobs_RV = mix(creative_RV, factual_RV, w_R, self.spec)
        nobody_R = torch.full_like(w_R, math.nan)
        return Mixed(
            logprobs_RV,
            factual_RV,
            w_R,
            temperature(w_R, plan.temperature_R, self.spec),
            nobody_R if p_div_R is None else p_div_R,
            nobody_R if p_dev_R is None else p_dev_R,
        )

    def _log_probabilities(self, side: int, hidden_Xd: Tensor | None, plan: Plan) -> Tensor | None:
        if hidden_Xd is None:
            return None
        return _in_order(self.members.log_probabilities(side, hidden_Xd), plan.order_R[side])


def _present(p_R: Tensor, absent_R: Tensor | None) -> Tensor:
    """A head's probabilities, NaN where its member did not run."""
    return p_R if absent_R is None else p_R.masked_fill(absent_R, math.nan)


def _or_neutral(p_R: Tensor | None) -> Tensor | None:
    return None if p_R is None else p_R.nan_to_num(nan=0.5)


def _in_order(rows_X: Tensor, order_R: Tensor | None) -> Tensor:
    return rows_X if order_R is None else rows_X.index_select(0, order_R)


def _order(rows: Sequence[int | None], device: str) -> Tensor | None:
    """Indices that bring a side's rows into the sequences' order; None when they are. Absent rows take any other's."""
    if list(rows) == list(range(len(rows))):
        return None
    return torch.tensor([row or 0 for row in rows], device=device)


def _absent(rows: Sequence[int | None], device: str) -> Tensor | None:
    return torch.tensor([row is None for row in rows], device=device) if None in rows else None

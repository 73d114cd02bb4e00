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
from tigerbot_serve.ensemble.dial import creative_weight, mix, mix_states, temperature
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

    `factual_RV` are the factual member's own, short of the constant `factual_norm_R` of each row; None where nobody
    needs them, or where they are `logprobs_RV` themselves.
    """

    logprobs_RV: Tensor
    factual_RV: Tensor | None
    factual_norm_R: Tensor | None
    w_R: Tensor
    temperature_R: Tensor
    p_div_R: Tensor
    p_dev_R: Tensor

    def expected(self, ids_R: Tensor) -> Tensor:
        """The factual member's log-probability (R,) of one token a sequence; the mixture's where p_dev is not read."""
        if self.factual_RV is None:
            return self.logprobs_RV.gather(1, ids_R[:, None])[:, 0]
        found_R = self.factual_RV.gather(1, ids_R[:, None])[:, 0]
        return found_R if self.factual_norm_R is None else found_R - self.factual_norm_R


class Mixture:
    """Members, their heads and the dial's rule."""

    def __init__(self, members: Members, heads: Heads | None, spec: DialSpec) -> None:
        self.members, self.heads, self.spec = members, heads, spec

    def next(self, creative_Cd: Tensor | None, factual_Fd: Tensor | None, surprise_R: Tensor, plan: Plan) -> Mixed:
        """The mixture at every sequence's last state; `surprise_R` is the lingering surprise of its last token."""
        creative_Rd = _in_order(creative_Cd, plan.order_R[CREATIVE])
        factual_Rd = _in_order(factual_Fd, plan.order_R[FACTUAL])
        p_div_R, p_dev_R = self._read(creative_Rd, factual_Rd, surprise_R, plan)
        w_R = plan.dial_R
        if not self.members.alone:
            w_R = creative_weight(plan.dial_R, _or_neutral(p_div_R), _or_neutral(p_dev_R), self.spec)
        logprobs_RV, factual_RV, norm_R = self._distribution(creative_Rd, factual_Rd, w_R)
        nobody_R = torch.full_like(w_R, math.nan)
        return Mixed(
            logprobs_RV,
            factual_RV,
            norm_R,
            w_R,
            temperature(w_R, plan.temperature_R, self.spec),
            nobody_R if p_div_R is None else p_div_R,
            nobody_R if p_dev_R is None else p_dev_R,
        )

    def _read(
        self, creative_Rd: Tensor | None, factual_Rd: Tensor | None, surprise_R: Tensor, plan: Plan
    ) -> tuple[Tensor | None, Tensor | None]:
        """p_div and p_dev of the members that ran."""
        p_div_R = p_dev_R = None
        if self.heads is None:
            return None, None
        if creative_Rd is not None and factual_Rd is not None:
            p_div_R, p_dev_R = self.heads.both(creative_Rd, factual_Rd, surprise_R)
        elif creative_Rd is not None:
            p_div_R = self.heads.p_div(creative_Rd)
        elif factual_Rd is not None:
            p_dev_R = self.heads.p_dev(torch.cat([factual_Rd.float(), surprise_R[:, None]], dim=1))
        return _present(p_div_R, plan.absent_R[CREATIVE]), _present(p_dev_R, plan.absent_R[FACTUAL])

    def _distribution(
        self, creative_Rd: Tensor | None, factual_Rd: Tensor | None, w_R: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The mixture's log-probabilities, the factual member's own (or None) and what these are short of (or None).

        p_dev reads how little the factual member expected the token, and its normaliser takes all V of its logits. So
        with heads its states ride along in the one product; of its softmax only the normaliser is made.
        """
        if creative_Rd is None or factual_Rd is None:
            side, hidden_Rd = (FACTUAL, factual_Rd) if creative_Rd is None else (CREATIVE, creative_Rd)
            assert hidden_Rd is not None
            return self.members.log_probabilities(side, hidden_Rd), None, None
        mixed_Rd = mix_states(creative_Rd, factual_Rd, w_R, self.spec) if self.members.shares_output else None
        if mixed_Rd is None:
            creative_RV, factual_RV = self.members.log_probabilities_of_both(CREATIVE, creative_Rd, factual_Rd)
            return mix(creative_RV, factual_RV, w_R, self.spec), factual_RV, None
        if self.heads is None:
            return self.members.log_probabilities(CREATIVE, mixed_Rd), None, None
        logits_2RV = self.members.logits(CREATIVE, torch.cat([mixed_Rd, factual_Rd]))
        mixed_RV, factual_RV = logits_2RV.chunk(2)
        return torch.log_softmax(mixed_RV, dim=-1), factual_RV, torch.logsumexp(factual_RV, dim=-1)


def _present(p_R: Tensor | None, absent_R: Tensor | None) -> Tensor | None:
    """A head's probabilities, NaN where its member did not run."""
    return p_R if p_R is None or absent_R is None else p_R.masked_fill(absent_R, math.nan)


def _or_neutral(p_R: Tensor | None) -> Tensor | None:
    return None if p_R is None else p_R.nan_to_num(nan=0.5)


def _in_order(rows_X: Tensor | None, order_R: Tensor | None) -> Tensor | None:
    return rows_X if rows_X is None or order_R is None else rows_X.index_select(0, order_R)


def _order(rows: Sequence[int | None], device: str) -> Tensor | None:
    """Indices that bring a side's rows into the sequences' order; None when they are. Absent rows take any other's."""
    if list(rows) == list(range(len(rows))):
        return None
    return torch.tensor([row or 0 for row in rows], device=device)


def _absent(rows: Sequence[int | None], device: str) -> Tensor | None:
    return torch.tensor([row is None for row in rows], device=device) if None in rows else None

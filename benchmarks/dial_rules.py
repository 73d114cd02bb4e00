"""The rules that the dial is measured against, each with the number that it is turned by.

Every rule is given its best form: the same plausibility mask as ours, and the single models are those of the ensemble.
A rule is a `tigerbot_serve.ensemble.offline.Rule`; a new one is a class here and a line in `rules`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tigerbot.spec import DialSpec
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL
from tigerbot_serve.ensemble.offline import Choice, Rule, ServedRule, Sides, View

TEMPERATURES = (0.0, 0.3, 0.6, 0.9, 1.2, 1.6, 2.0)
NUCLEI = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0)
DIALS = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
DECAY, LEAST = 0.9, 0.3  # lambda and omega of factual-nucleus sampling, as its authors recommend


@dataclass(frozen=True)
class Contender:
    """A rule, what it is turned by, and whether only one model runs."""

    name: str
    rule: Rule
    settings: Sequence[float]
    single: bool = False


def contenders(spec: DialSpec) -> list[Contender]:
    """Ours first."""
    return [
        Contender("the dial", ServedRule(spec), DIALS),
        Contender("fixed w (a = b = 0)", ServedRule(spec.model_copy(update={"a": 0.0, "b": 0.0})), DIALS),
        Contender("entropies in place of heads", EntropyRule(spec), DIALS),
        Contender("temperature, factual model", TemperatureRule(FACTUAL, spec), TEMPERATURES, single=True),
        Contender("temperature, creative model", TemperatureRule(CREATIVE, spec), TEMPERATURES, single=True),
        Contender("factual-nucleus, factual model", FactualNucleus(FACTUAL), NUCLEI, single=True),
        Contender("factual-nucleus, creative model", FactualNucleus(CREATIVE), NUCLEI, single=True),
        Contender("REAL-like, creative model", ResidualEntropy(), (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 8.0), single=True),
    ]


class TemperatureRule:
    """One model; the setting is its temperature."""

    def __init__(self, side: int, spec: DialSpec) -> None:
        self._side, self.floor = side, spec.plausibility

    def sides(self, setting: float) -> Sides:
        return (self._side,)

    def __call__(self, view: View) -> Choice:
        rows_nV = _of(view, self._side)
        return Choice(rows_nV, torch.full((len(rows_nV),), view.setting), [1.0] * len(rows_nV))


class FactualNucleus:
    """2206.04624: top-p shrinks from token to token of a sentence, `max(omega, p lambda^(t-1))`; the setting is p."""

    floor = 0.0

    def __init__(self, side: int) -> None:
        self._side = side

    def sides(self, setting: float) -> Sides:
        return (self._side,)

    def __call__(self, view: View) -> Choice:
        rows_nV = _of(view, self._side)
        # A sentence ends rarely in these answers before they do, so the count begins with the answer.
        least = min(LEAST, view.setting)
        shares = [max(least, view.setting * DECAY ** len(said)) for said in view.said]
        return Choice(rows_nV, torch.ones(len(rows_nV)), shares)


class EntropyRule:
    """The dial's own formula with untrained numbers: p_div is 1 - e^-H(creative), p_dev is 1 - max p(factual)."""

    def __init__(self, spec: DialSpec) -> None:
        self._served = ServedRule(spec)
        self.floor = spec.plausibility

    def sides(self, setting: float) -> Sides:
        return self._served.sides(setting)

    def __call__(self, view: View) -> Choice:
        room_n = None if view.creative_nV is None else 1 - torch.exp(-_entropy(view.creative_nV))
        risk_n = None if view.factual_nV is None else 1 - view.factual_nV.max(dim=-1).values.exp()
        return self._served(View(view.setting, view.creative_nV, view.factual_nV, room_n, risk_n, view.said))


class ResidualEntropy:
    """After 2406.07735: top-p is `exp(-r / T)`, r the entropy beyond what a trained predictor says the text itself has.

    There the predictor is fitted on a family of models of many sizes; here p_div stands for it, as the collision entropy
    -ln(1 - p_div) that it means. The setting is T.
    """

    floor = 0.0

    def sides(self, setting: float) -> Sides:
        return (CREATIVE,)

    def __call__(self, view: View) -> Choice:
        rows_nV = _of(view, CREATIVE)
        own_n = torch.zeros(len(rows_nV)) if view.p_div_n is None else -torch.log1p(-view.p_div_n.clamp(max=0.999))
        residual_n = (_entropy(rows_nV) - own_n).clamp(min=0.0)
        shares = [max(1e-3, math.exp(-residual / view.setting)) for residual in residual_n.tolist()]
        return Choice(rows_nV, torch.ones(len(rows_nV)), shares)


def _of(view: View, side: int) -> Tensor:
    rows_nV = view.creative_nV if side == CREATIVE else view.factual_nV
    assert rows_nV is not None
    return rows_nV


def _entropy(logprobs_nV: Tensor) -> Tensor:
    return -(logprobs_nV.exp() * logprobs_nV.clamp(min=-1e4)).sum(dim=-1)

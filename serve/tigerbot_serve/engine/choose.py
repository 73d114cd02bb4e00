"""One token for every sequence of a step: mix, steer, sample, append. The only place where numbers leave the device.

Legend: R sequences of the step, C and F rows of the creative and the factual side, d hidden width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tigerbot.surprise import linger
from tigerbot_serve.engine.request import TokenEvent
from tigerbot_serve.engine.sampler import sample
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.engine.steer import steer
from tigerbot_serve.ensemble.mixture import Mixture, Plan


def choose(
    mixture: Mixture,
    sequences: list[Sequence],
    plan: Plan,
    creative_Cd: Tensor | None,
    factual_Fd: Tensor | None,
) -> list[TokenEvent]:
    """Draw each sequence's next token from its members' last states and append it.

    The p_dev read here belongs to two tokens: it is what the factual member's state says about the token just fed,
    which is recorded for that token, and the risk that steers the choice of the next one. The event of the next token
    carries the latter until that token is fed itself; an answer's last token keeps it unless the judge reads it.
    """
    device = plan.dial_R.device
    surprise_R = torch.tensor([sequence.surprise for sequence in sequences], dtype=torch.float32, device=device)
    mixed = mixture.next(creative_Cd, factual_Fd, surprise_R, plan)
    # One draw a token, greedy or not, so that a seed means the same text in every mode.
    draws = [sequence.rng.random() for sequence in sequences]
    uniform_R = torch.tensor(draws, dtype=torch.float64, device=device)
    ids_R = sample(
        steer(mixed.logprobs_RV, sequences),
        mixed.temperature_R,
        plan.top_p,
        uniform_R,
        floor=mixture.spec.plausibility,
        top_k=[sequence.request.top_k for sequence in sequences],
        min_p=[sequence.request.min_p for sequence in sequences],
    )
    chosen_R = mixed.logprobs_RV.gather(1, ids_R[:, None])[:, 0]
    expected_R = mixed.expected(ids_R)
    numbers = torch.stack([chosen_R, expected_R, mixed.p_div_R, mixed.p_dev_R, mixed.w_R], dim=1).tolist()
    return record(sequences, ids_R.tolist(), tops(mixed.logprobs_RV, sequences), numbers)


def record(
    sequences: list[Sequence],
    ids: list[int],
    alternatives: list[tuple[tuple[int, float], ...]],
    numbers: list[list[float]],
) -> list[TokenEvent]:
    """Append what was drawn; `numbers` are log-probability, the factual member's own, p_div, p_dev and w of each."""
    events = []
    for sequence, token, top, (logprob, expected, p_div, p_dev, w) in zip(
        sequences, ids, alternatives, numbers, strict=True
    ):
        risk = _or_none(p_dev)
        sequence.read_p_dev(risk)
        sequence.surprise = linger(sequence.surprise, -expected)
        if risk is not None:
            sequence.expected.append(expected)
        events.append(sequence.append(token, logprob, top, _or_none(p_div), risk, w))
    return events


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def tops(logprobs_RV: Tensor, sequences: list[Sequence]) -> list[tuple[tuple[int, float], ...]]:
    """The most likely alternatives of those who asked."""
    wanted = [sequence.request.logprobs or 0 for sequence in sequences]
    if not any(wanted):
        return [()] * len(sequences)
    values_RK, ids_RK = logprobs_RV.topk(min(max(wanted), logprobs_RV.shape[-1]), dim=-1)
    pairs = zip(ids_RK.tolist(), values_RK.tolist(), wanted, strict=True)
    return [tuple(zip(ids[:count], values[:count], strict=True)) for ids, values, count in pairs]

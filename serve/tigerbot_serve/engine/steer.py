"""What a request changes in the mixture's row before a token is drawn: penalties, biases, bans, its grammar.

It works on the mixed row, once, so the ends of the dial stay the single models and nothing is counted for each member.
A row always keeps a token: the grammar stands above a ban, and bans that would leave nothing are not kept.

Legend: R sequences of the step, V vocabulary, K tokens of a list.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from tigerbot_serve.engine.grammar import Unfollowed
from tigerbot_serve.engine.request import Request
from tigerbot_serve.engine.sequence import Sequence

BAN = -100.0
_LEAST = -1e30  # below every log-probability, and still a number: what a grammar allows can always be drawn


def steer(logprobs_RV: Tensor, sequences: list[Sequence]) -> Tensor:
    """Scores (R, V) to draw from, natural logs up to a constant a row; the same tensor where no request asks."""
    asking = [
        index
        for index, sequence in enumerate(sequences)
        if sequence.matcher or sequence.pull or changes(sequence.request)
    ]
    if not asking:
        return logprobs_RV
    steered_RV = logprobs_RV.clone()
    for index in asking:
        steered_RV[index] = _steered(logprobs_RV[index].clamp(min=_LEAST), sequences[index])
    return steered_RV


def changes(request: Request) -> bool:
    """Whether a request changes scores, its grammar apart."""
    penalties = request.presence_penalty or request.frequency_penalty or request.repetition_penalty != 1
    return bool(penalties or request.logit_bias)


def _steered(row_V: Tensor, sequence: Sequence) -> Tensor:
    request = sequence.request
    if request.repetition_penalty != 1:
        seen_K = _ids({*sequence.prompt_ids, *sequence.counts}, row_V)
        row_V[seen_K] = (row_V[seen_K] * request.repetition_penalty).clamp(min=_LEAST)
    if (request.presence_penalty or request.frequency_penalty) and sequence.counts:
        counts_K = torch.tensor(list(sequence.counts.values()), dtype=row_V.dtype, device=row_V.device)
        row_V[_ids(sequence.counts, row_V)] -= counts_K * request.frequency_penalty + request.presence_penalty
    biases = {token: bias for token, bias in request.logit_bias if token < len(row_V)}
    if biases:
        row_V[_ids(biases, row_V)] += torch.tensor(list(biases.values()), dtype=row_V.dtype, device=row_V.device)
    if sequence.pull is not None:
        row_V = sequence.pull.add(row_V, sequence.output_ids)
    if sequence.matcher is not None:
        row_V = _held(row_V, sequence)
    banned = [token for token, bias in biases.items() if bias <= BAN]
    if banned:
        left_V = row_V.index_fill(0, _ids(banned, row_V), -math.inf)
        row_V = left_V if bool((left_V > -math.inf).any()) else row_V
    return row_V


def _held(row_V: Tensor, sequence: Sequence) -> Tensor:
    """The row with only what the grammar allows; a grammar that cannot be followed further ends its sequence."""
    assert sequence.matcher is not None
    try:
        allowed_V = torch.from_numpy(sequence.matcher.allowed(len(row_V))).to(row_V.device)
    except Unfollowed as error:
        sequence.failure = str(error)
        return row_V
    return row_V.masked_fill_(~allowed_V, -math.inf)


def _ids(tokens: Collection[int], like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.long, device=like.device)

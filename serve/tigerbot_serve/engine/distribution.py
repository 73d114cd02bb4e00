"""What a token is drawn from in the end, as probabilities: for those who compare distributions, not only draw.

Legend: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from tigerbot_serve.engine.sampler import weigh
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.engine.steer import changes


def probabilities(logprobs_RV: Tensor, temperature_R: Tensor, sequences: Many[Sequence], floor: float) -> Tensor:
    """Probabilities (R, V), float64: what `sample` draws by, with temperature, plausibility mask, min_p, top_k, top_p.

    Row i is of sequence i. At temperature 0 the most likely token has all.
    """
    asked = [sequence.request for sequence in sequences]
    weights_RV = weigh(
        logprobs_RV,
        temperature_R,
        [one.top_p for one in asked],
        floor,
        top_k=[one.top_k for one in asked],
        min_p=[one.min_p for one in asked],
    ).double()
    one_RV = torch.zeros_like(weights_RV).scatter_(1, logprobs_RV.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where((temperature_R > 0)[:, None], weights_RV / weights_RV.sum(dim=-1, keepdim=True), one_RV)


def steered(sequence: Sequence) -> bool:
    """Whether the request changes scores by what was said before: those rows are stepped plainly, both members each."""
    return sequence.matcher is not None or sequence.pull is not None or changes(sequence.request)

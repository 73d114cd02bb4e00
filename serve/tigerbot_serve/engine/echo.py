"""Log-probabilities of a prompt's own tokens, for requests that ask: what `echo` with `logprobs` shows.

The mixture says them at every place of the prompt as it would for an answer there. This costs a vocabulary-wide row a
prompt token, so it runs only where it is asked for.

Legend: T tokens read, n those of them that another prompt token follows, d hidden width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tigerbot_serve.engine.request import TokenEvent
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.ensemble.mixture import Mixture, Plan


def read_prompt(
    mixture: Mixture, sequence: Sequence, start: int, creative_1Td: Tensor | None, factual_1Td: Tensor | None
) -> None:
    """The states of the prompt's tokens from `start` on say what each thought of the next one."""
    wanted = sequence.request.prompt_logprobs
    if wanted is None:
        return
    if start == 0:
        sequence.read_prompt(TokenEvent("", sequence.prompt_ids[0], math.nan, (), None, None, sequence.dial))
    states = [None if side is None else side[0] for side in (creative_1Td, factual_1Td)]
    length = max(len(side_Td) for side_Td in states if side_Td is not None)
    following = sequence.prompt_ids[start + 1 : start + length + 1]
    if not following:
        return
    count = len(following)
    creative_nd, factual_nd = [None if side_Td is None else side_Td[:count] for side_Td in states]
    rows = [[None if side is None else index for index in range(count)] for side in states]
    device = mixture.members.device
    plan = Plan([sequence.dial] * count, [None] * count, [1.0] * count, (rows[0], rows[1]), device)
    mixed = mixture.next(creative_nd, factual_nd, torch.zeros(count, device=device), plan)
    chosen = mixed.logprobs_RV.gather(1, torch.tensor(following, device=device)[:, None])[:, 0].tolist()
    values_nK, ids_nK = mixed.logprobs_RV.topk(min(wanted, mixed.logprobs_RV.shape[-1]), dim=-1)
    for token, logprob, ids, values, w in zip(
        following, chosen, ids_nK.tolist(), values_nK.tolist(), mixed.w_R.tolist(), strict=True
    ):
        tops = tuple(zip(ids, values, strict=True))
        sequence.read_prompt(TokenEvent("", token, logprob, tops, None, None, w))

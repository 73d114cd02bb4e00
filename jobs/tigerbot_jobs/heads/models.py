"""What the heads need of a model: hidden states and surprise at given texts, and continuations. Batched by length.

Shapes: n sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tigerbot.surprise import lingering
from tigerbot_jobs.heads.examples import Example

_BATCH = 64


@torch.inference_mode()
def hidden_states(model: Any, examples: Sequence[Example], *, surprise: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Final normed hidden states of all labelled tokens, float32 (tokens, D), and their labels, in order.

    With `surprise` each state has the lingering surprise of its token as one more number.
    """
    states: list[np.ndarray | None] = [None] * len(examples)
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].ids))
    for at in range(0, len(order), _BATCH):
        chosen = order[at : at + _BATCH]
        ids_nT = _padded([examples[index].ids for index in chosen])
        h_nTD = _last_hidden(model, ids_nT).float()
        if surprise:
            starts = [examples[index].start for index in chosen]
            h_nTD = torch.cat([h_nTD, _surprise(model, h_nTD, ids_nT, starts)[..., None]], dim=-1)
        for row, index in enumerate(chosen):
            places = [place for place, _ in examples[index].labels]
            states[index] = h_nTD[row, places].numpy()
    labels = np.array([label for example in examples for _, label in example.labels], dtype=np.float32)
    return np.concatenate([state for state in states if state is not None]), labels


@torch.inference_mode()
def continued(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    ends: Sequence[int],
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Up to `tokens` further ids of every prompt, without the end token; temperature 0 is greedy."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for length, chosen in _equal_lengths(order, prompts):
        for at in range(0, len(chosen), 4 * _BATCH):
            rows = chosen[at : at + 4 * _BATCH]
            ids = torch.tensor([list(prompts[index]) for index in rows])
            assert ids.shape[1] == length
            for index, new in zip(rows, _decode(model, ids, tokens, ends, temperature, generator), strict=True):
                found[index] = new
    return found


def _decode(
    model: Any, ids_nT: Tensor, tokens: int, ends: Sequence[int], temperature: float, generator: torch.Generator
) -> list[list[int]]:
    cache, alive = None, torch.ones(len(ids_nT), dtype=torch.bool)
    found: list[list[int]] = [[] for _ in range(len(ids_nT))]
    fed = ids_nT
    for _ in range(tokens):
        made = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits_nV = made.past_key_values, made.logits[:, -1].float()
        if temperature:
            next_n = torch.multinomial((logits_nV / temperature).softmax(-1), 1, generator=generator)[:, 0]
        else:
            next_n = logits_nV.argmax(-1)
        alive &= ~torch.isin(next_n, torch.tensor(list(ends)))
        for row in alive.nonzero()[:, 0].tolist():
            found[row].append(int(next_n[row]))
        if not alive.any():
            break
        fed = next_n[:, None]
    return found


def _equal_lengths(order: list[int], prompts: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    groups: dict[int, list[int]] = {}
    for index in order:
        groups.setdefault(len(prompts[index]), []).append(index)
    return list(groups.items())


def _last_hidden(model: Any, ids_nT: Tensor) -> Tensor:
    # Padding stands after the text, where a causal model cannot see it.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_decoder()(input_ids=ids_nT, use_cache=False).last_hidden_state


def _surprise(model: Any, h_nTD: Tensor, ids_nT: Tensor, starts: Sequence[int]) -> Tensor:
    """Lingering surprise (n, T) of every token from its row's start on, 0 before it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    logprobs_nTV = torch.log_softmax(base.get_output_embeddings()(h_nTD[:, :-1]).float(), dim=-1)
    surprise_nT = -logprobs_nTV.gather(2, ids_nT[:, 1:, None])[..., 0]
    found_nT = torch.zeros(ids_nT.shape)
    for row, start in enumerate(starts):
        if start < ids_nT.shape[1]:
            found_nT[row, start:] = torch.tensor(lingering(surprise_nT[row, start - 1 :].tolist()))
    return found_nT


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(list(row))
    return ids

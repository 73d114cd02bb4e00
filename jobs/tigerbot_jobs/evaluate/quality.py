"""How good a base model is: bits per byte on held-out text, beside a 5-gram model that saw the same tokens.

Bits per byte does not depend on the tokenizer, so models with different vocabularies can be compared.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tigerbot.models import load_model, load_tokenizer
from tigerbot.tokens import TokenShards
from tigerbot_jobs.evaluate.ngram import NGram


@dataclass(frozen=True)
class Quality:
    """Bits per byte of the model and of the 5-gram floor over `bytes` bytes of held-out text."""

    model: float
    ngram: float
    bytes: int


def base_quality(model_folder: str, train: Sequence[str], held_out: Sequence[str], *, limit: int = 400) -> Quality:
    """Measure a model folder on up to `limit` sequences of each held-out shard folder.

    The first token of a document is given, not scored: nothing comes before it in either model.
    """
    tokenizer = load_tokenizer(model_folder)
    documents = [ids for folder in held_out for ids in documents_of(folder, limit)]
    size = sum(len(tokenizer.decode(ids[1:]).encode()) for ids in documents)
    floor = NGram((ids for folder in train for ids in documents_of(folder)), len(tokenizer))
    counted = sum(floor.bits(ids) - floor.bits(ids[:1]) for ids in documents)
    return Quality(model=_model_bits(model_folder, documents) / size, ngram=counted / size, bytes=size)


def documents_of(folder: str, limit: int | None = None) -> Iterable[list[int]]:
    """The documents packed in a shard folder, cut apart where positions begin anew; padding is left out."""
    shards = TokenShards(folder)
    count = len(shards) if limit is None else min(limit, len(shards))
    for index in range(count):
        batch = shards.batch(np.array([index]))
        ids, positions, kept = batch.input_ids[0], batch.position_ids[0], batch.attention_mask[0]
        starts = [*np.flatnonzero((positions == 0) & (kept > 0)).tolist(), int(kept.sum())]
        for start, end in itertools.pairwise(starts):
            if end - start > 1:
                yield ids[start:end].tolist()


@torch.no_grad()
def _model_bits(folder: str, documents: Sequence[Sequence[int]]) -> float:
    model = load_model(folder, "float32").eval()
    nats = 0.0
    for ids in sorted(documents, key=len):
        x_T = torch.tensor(ids)
        logits_TV = model(x_T[None]).logits[0, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits_TV, x_T[1:], reduction="sum").item()
    return nats / math.log(2)

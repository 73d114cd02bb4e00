"""`tiger run SPEC --dry-run` of a train spec: the plan, the memory, and what the model would read, with nothing started."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from tigerbot.models import load_tokenizer, parameter_count, tokenizer_hash
from tigerbot.spec import TrainSpec
from tigerbot.tokens import IGNORE, Batch, Mixture, TokenShards
from tigerbot_jobs.train.data import check_tokenizer, plan_batches
from tigerbot_jobs.train.model import tokenizer_folder

SHOWN = 2


def preview(spec: TrainSpec) -> list[str]:
    """Lines for a terminal. Text in ⟦brackets⟧ carries no loss.

    Raises:
        SpecError, DataError, ModelError: what `run` would say too.
    """
    workers = spec.scale.bounds[1]
    plan = plan_batches(spec, workers)
    folder = tokenizer_folder(spec.model)
    tokenizer = load_tokenizer(folder)
    lines = [
        f"{plan.steps:,} steps of {plan.sequences} sequences x {spec.data.sequence_length} tokens; {workers} workers, "
        f"each {plan.micro_steps} micro batches of {plan.micro}",
    ]
    if spec.model.preset:
        lines.append(_memory(parameter_count(spec.model.preset, len(tokenizer)), spec, workers))
    packed = [source for source in spec.data.train if source.format == "tokens"]
    if not packed:
        return [*lines, "the sources are text: they are packed when the run starts"]
    shards = [(TokenShards(source.path, spec.data.sequence_length), source.weight) for source in packed]
    for opened, _ in shards:
        check_tokenizer(opened, tokenizer_hash(Path(folder)))
    batch = Mixture(shards, spec.train.seed).batch(0, SHOWN)
    return [*lines, *(f"sequence {row}: {_decoded(tokenizer, batch, row)}" for row in range(SHOWN))]


def _memory(parameters: int, spec: TrainSpec, workers: int) -> str:
    """Bytes of weights, gradients, master weights and Adam's moments (Rajbhandari et al. 2020), without activations."""
    stage = spec.deepspeed.get("zero_stage", spec.deepspeed.get("zero_optimization", {}).get("stage", 2))
    states = 12 * parameters / (workers if stage >= 1 else 1)
    gradients = 4 * parameters / (workers if stage >= 2 else 1)
    weights = 4 * parameters / (workers if stage >= 3 else 1)
    total = states + gradients + weights
    return f"{parameters / 1e6:,.1f} M parameters; model state {total / 2**30:,.2f} GiB a worker at ZeRO {stage}, activations beside it"


def _decoded(tokenizer: Any, batch: Batch, row: int) -> str:
    """One sequence as text, document by document, with what carries no loss in brackets."""
    ids, counts = batch.input_ids[row], batch.labels[row] != IGNORE
    kept = batch.attention_mask[row] > 0
    ids, counts = ids[kept], counts[kept]
    borders = [0, *(np.flatnonzero(np.diff(counts.astype(int))) + 1).tolist(), len(ids)]
    pieces = []
    for begin, end in itertools.pairwise(borders):
        text = tokenizer.decode(ids[begin:end].tolist())
        pieces.append(text if counts[begin] else f"⟦{text}⟧")
    return "".join(pieces)[:600].replace("\n", "⏎")

"""Our engine with one model against transformers' continuous batching, greedy, at batch 1 and 8.

Theirs is at its best on a CPU: float32 as ours, SDPA, a cache just large enough, no sharing of blocks, a manager that
lives on between rounds, no processors. SmolLM2-135M takes part where its wheel is installed
(docs/decisions/smollm2-without-llama-cpp.md).
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.decoding import IDS, NEW, THREADS, VOCABULARY, decode, engine_of, in_turn, ratio_row, write_base
from benchmarks.harness import Row
from tigerbot.errors import ModelError
from tigerbot.gguf import load_gguf, load_gguf_tokenizer
from tigerbot.models import load_model, save_model

TARGETS = {1: "≥ 1.8", 8: "≥ 1.5"}


def main(models: tuple[str, ...] = (*VOCABULARY, "smollm2"), batches: tuple[int, ...] = (1, 8)) -> list[Row]:
    torch.set_num_threads(THREADS)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for model in models:
            try:
                rows += _rows(model, _folder(model, Path(name) / model), batches)
            except ModelError as error:
                print(f"  {model} is left out: {error}")
    return rows


def _folder(model: str, folder: Path) -> Path:
    if model == "smollm2":
        return save_model(load_gguf(model), load_gguf_tokenizer(model), folder)
    write_base(model, folder)
    return folder / "base"


def _rows(model: str, folder: Path, batches: tuple[int, ...]) -> list[Row]:
    engine = engine_of({"creative": str(folder)})
    engine._end_ids = frozenset()  # full length on both sides, whatever the model says
    theirs: Any = load_model(folder).eval()
    rows = []
    try:
        for batch in batches:
            sides = {
                "ours": partial(decode, engine, batch, temperature=0.0),
                "transformers": partial(_generate_batch, theirs, batch),
            }
            found = in_turn(sides, f"{model} batch {batch}")
            label = f"our engine / transformers' continuous batching, `{model}`, batch {batch}"
            rows.append(ratio_row(label, found, "ours", "transformers", TARGETS[batch]))
            theirs.destroy_cached_continuous_batching_manager()
    finally:
        engine.stop()
    return rows


def _generate_batch(model: Any, batch: int) -> float:
    began = time.perf_counter()
    found = model.generate_batch(
        [IDS] * batch,
        generation_config=GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=2 * batch, max_batch_tokens=512, allow_block_sharing=False, max_requests_per_batch=batch
        ),
        persistent_manager=True,
        warmup=False,
    )
    tokens = sum(len(one.generated_tokens) for one in found.values())
    assert tokens == batch * NEW, f"{tokens} tokens instead of {batch * NEW}"
    return tokens / (time.perf_counter() - began)

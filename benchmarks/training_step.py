"""Our loop under Ray Train beside a bare loop of two processes with DeepSpeed: same model, batch, threads, precision.

Both read the same packed shards; the bare loop is what one writes by hand: batch, forward with labels, backward, step.
Tokens a second of the median step, start-up left out on both sides.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Row, ratio
from benchmarks.ranks import on_two_ranks, results, stock_engine
from tigerbot.models import build, load_tokenizer, tokenizer_hash
from tigerbot.runner import run_spec
from tigerbot.spec import parse_spec
from tigerbot.tokens import Mixture, Packed, TokenShards, write_shards
from tigerbot_jobs.data.tokenizer import train_tokenizer
from tigerbot_jobs.train.metrics import read_rows

LENGTH, BATCH, MICRO, STEPS, WARMUP = 256, 32, 8, 40, 10
VOCABULARY = 2048


def main() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = _shards(folder)
        runs = iter(range(1000))

        def ours() -> float:
            run_spec(parse_spec(_spec(folder, shards, next(runs))))
            rows = read_rows(max(folder.glob("ours-*"), key=lambda p: p.stat().st_mtime) / "metrics.jsonl")
            return statistics.median(row["tokens_per_second"] for row in rows if row["step"] > WARMUP)

        def stock() -> float:
            on_two_ranks(_bare, str(shards), str(folder / "rate"))
            return results(folder / "rate")

        note = "2 workers x 1 thread, `tiny`, bf16 products, ZeRO-2, 2 micro batches a step"
        return [ratio("training step", ours, stock, unit="tokens/s", target=">= 0.97", pairs=10, note=note)]


def _shards(folder: Path) -> Path:
    train_tokenizer(["The fox sings. 狐狸唱歌。" * 5] * 50, 600, folder / "tokenizer")
    rng = np.random.default_rng(1)
    starts = np.zeros(LENGTH, dtype=bool)
    starts[0] = True
    count = len(load_tokenizer(folder / "tokenizer"))
    made = (Packed(rng.integers(80, count, LENGTH), np.ones(LENGTH, dtype=bool), starts) for _ in range(400))
    found = tokenizer_hash(folder / "tokenizer")
    return write_shards(folder / "tokens", made, LENGTH, tokenizer_hash=found, vocab_size=count, pad_id=0)


def _spec(folder: Path, shards: Path, index: int) -> dict[str, Any]:
    return {
        "kind": "train",
        "name": f"ours-{index}",
        "model": {"preset": "tiny", "tokenizer": str(folder / "tokenizer")},
        "data": {"sequence_length": LENGTH, "train": [{"path": str(shards)}]},
        "train": {
            "tokens": STEPS * BATCH * LENGTH,
            "batch_tokens": BATCH * LENGTH,
            "micro_batch": MICRO,
            "precision": "bf16",
            "log_every": 5,
        },
        "scale": {"workers": 2, "threads_per_worker": 1},
        "storage": {"uri": str(folder)},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }


def _bare(rank: int, shards: str, result: str) -> None:
    mixture = Mixture([(TokenShards(shards), 1.0)], seed=1)
    model = build("tiny", mixture.shards[0].vocab_size, 1)
    engine = stock_engine(model, micro=MICRO, micro_steps=BATCH // MICRO // 2, lr=3e-4)
    seconds = []
    for step in range(STEPS):
        began = time.perf_counter()
        for micro in range(BATCH // MICRO // 2):
            batch = mixture.batch(step * BATCH + rank * BATCH // 2 + micro * MICRO, MICRO)
            ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels.copy())
            with torch.autocast("cpu", torch.bfloat16):
                loss = engine(input_ids=ids, labels=labels, use_cache=False).loss
            engine.backward(loss)
            engine.step()
        seconds.append(time.perf_counter() - began)
    if rank == 0:
        Path(result).write_text(str(BATCH * LENGTH / statistics.median(seconds[WARMUP:])))

"""Tokens read from packed shards on one core: the batch that the loop asks for, labels and positions made."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Row, rate
from tigerbot.tokens import Mixture, Packed, TokenShards, write_shards

LENGTH, SEQUENCES, BATCH = 2048, 4000, 64


def main() -> list[Row]:
    rng = np.random.default_rng(1)

    def packed() -> Packed:
        starts = np.zeros(LENGTH, dtype=bool)
        starts[:: int(rng.integers(100, 600))] = True
        return Packed(rng.integers(1, 32_000, LENGTH), np.ones(LENGTH, dtype=bool), starts)

    with tempfile.TemporaryDirectory() as folder:
        made = (packed() for _ in range(SEQUENCES))
        path = write_shards(Path(folder) / "t", made, LENGTH, tokenizer_hash="x", vocab_size=32_000, pad_id=0)
        mixture = Mixture([(TokenShards(path), 1.0)], seed=1)
        mixture.batch(0, SEQUENCES)

        def once() -> float:
            began = time.perf_counter()
            for position in range(0, SEQUENCES, BATCH):
                mixture.batch(position, BATCH)
            return SEQUENCES * LENGTH / (time.perf_counter() - began) / 1e6

        return [rate("token shards read, million tokens/s on one core", once, target=">= 50", better="higher")]

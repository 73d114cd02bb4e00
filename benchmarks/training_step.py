"""Our loop under Ray Train beside a bare loop of two processes with DeepSpeed: same model, batch, threads, precision.

Both read the same packed shards; the bare loop is what one writes by hand: batch, forward with labels, backward, step.
They take turns of two seconds, so that both meet the same machine. Every step counts whole: data, snapshot, checkpoint.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from benchmarks.harness import Row
from benchmarks.ranks import on_two_ranks, stock_engine
from benchmarks.turns import Side, started, warm
from tigerbot.models import build, load_tokenizer, tokenizer_hash
from tigerbot.tokens import Mixture, Packed, TokenShards, write_shards
from tigerbot_jobs.data.tokenizer import train_tokenizer
from tigerbot_jobs.train.ledger import read_events

LENGTH, BATCH, MICRO = 256, 16, 4
WARMUP, TURNS, TURN_S = 40, 80, 2.0
RAY_NICENESS = 15  # of every worker of Ray's; without it the bare loop would be disturbed less


def main() -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = _shards(folder)
        spec, seconds = folder / "ours.yaml", folder / "bare.txt"
        spec.write_text(yaml.safe_dump(_spec(folder, shards, "ours")))
        bare = [sys.executable, "-m", "benchmarks.training_step", str(shards), str(seconds)]
        ours = [sys.executable, "-m", "tigerbot.cli", "run", str(spec)]
        with started(ours, folder / "ours.log") as first, started(bare, folder / "bare.log") as second:
            sides = (
                Side(first, lambda: _our_steps(folder / "ours/ledger.jsonl"), "RayTrainWorker"),
                Side(second, lambda: _lines(seconds), "spawn_main"),
            )
            sides[1].stop()
            warm(sides[0], WARMUP)
            sides[1].go_on()
            warm(sides[1], WARMUP)
            for turn in range(TURNS):
                for side in sides if turn % 2 else sides[::-1]:
                    side.take_turn(TURN_S)
            took, used = [side.of_turns() for side in sides], [side.cpu_s_a_step() for side in sides]
    ratio = used[0] / used[1]
    ours_s, bare_s = (f"{seconds * 1000:.0f} ms" for seconds in used)
    note = "what a step costs where Ray's and MLflow's processes have a core of their own"
    cpu = Row("the same, CPU time of the ranks", ratio, ratio, ratio, "lower", "<= 1.03", 1, ours_s, bare_s, note)
    return [_row(*took), cpu]


def _row(ours: list[list[float]], bare: list[list[float]]) -> Row:
    """The quarter of steps that the machine disturbed least; the interval resamples turns."""
    pairs = [(a, b) for a, b in zip(ours, bare, strict=True) if a and b]
    chance = random.Random(1)
    drawn = sorted(_quartiles([chance.choice(pairs) for _ in pairs])[2] for _ in range(1000))
    ours_s, bare_s, value = _quartiles(pairs)
    return Row(
        "step time with everything on, ours / a bare DeepSpeed loop",
        value,
        drawn[50],
        drawn[-50],
        "lower",
        "<= 1.03",
        len(pairs),
        ours=f"{ours_s * 1000:.0f} ms",
        stock=f"{bare_s * 1000:.0f} ms",
        note="first quartile of steps in turns of 2 s, 90% interval; 2 workers x 1 thread, `tiny`, bf16, ZeRO-2",
    )


def _quartiles(pairs: list[tuple[list[float], list[float]]]) -> tuple[float, float, float]:
    """Ours, the bare loop's, and their ratio."""
    ours, bare = (statistics.quantiles([s for pair in pairs for s in pair[side]], n=4)[0] for side in (0, 1))
    return ours, bare, ours / bare


def _our_steps(ledger: Path) -> list[tuple[float, float]]:
    """A row is the whole turn of the loop: data, step, snapshot, checkpoint. Rows of one event followed one another."""
    found = []
    for event in read_events(ledger) if ledger.exists() else []:
        at = event.t
        for row in reversed(event.items("rows") if event.kind == "steps" else []):
            found.append((at, float(row[1])))
            at -= float(row[1])
    return sorted(found)


def _lines(path: Path) -> list[tuple[float, float]]:
    whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return [(float(at), float(seconds)) for at, seconds in (line.split() for line in whole)]


def _shards(folder: Path) -> Path:
    train_tokenizer(["The fox sings. 狐狸唱歌。" * 5] * 50, 600, folder / "tokenizer")
    rng = np.random.default_rng(1)
    starts = np.zeros(LENGTH, dtype=bool)
    starts[0] = True
    count = len(load_tokenizer(folder / "tokenizer"))
    made = (Packed(rng.integers(80, count, LENGTH), np.ones(LENGTH, dtype=bool), starts) for _ in range(400))
    found = tokenizer_hash(folder / "tokenizer")
    return write_shards(folder / "tokens", made, LENGTH, tokenizer_hash=found, vocab_size=count, pad_id=0)


def _spec(folder: Path, shards: Path, name: str) -> dict[str, Any]:
    return {
        "kind": "train",
        "name": name,
        "model": {"preset": "tiny", "tokenizer": str(folder / "tokenizer")},
        "data": {"sequence_length": LENGTH, "train": [{"path": str(shards)}]},
        "train": {
            "tokens": 10**8,
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
    os.nice(RAY_NICENESS)
    mixture = Mixture([(TokenShards(shards), 1.0)], seed=1)
    model = build("tiny", mixture.shards[0].vocab_size, 1)
    engine = stock_engine(model, micro=MICRO, micro_steps=BATCH // MICRO // 2, lr=3e-4)
    with open(result, "a", buffering=1) as log:
        for step in range(10**6):
            began = time.perf_counter()
            for micro in range(BATCH // MICRO // 2):
                batch = mixture.batch(step * BATCH + rank * BATCH // 2 + micro * MICRO, MICRO)
                ids, labels = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels.copy())
                with torch.autocast("cpu", torch.bfloat16):
                    loss = engine(input_ids=ids, labels=labels, use_cache=False).loss
                engine.backward(loss)
                engine.step()
            if rank == 0:
                log.write(f"{time.time()} {time.perf_counter() - began}\n")


if __name__ == "__main__":
    on_two_ranks(_bare, *sys.argv[1:])

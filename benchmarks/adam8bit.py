"""AdamW with one byte a moment beside torch's AdamW: the loss it reaches and what it holds.

`tiny` learns sequences that follow a rule (the next token is a fixed function of the last two, one in eight is noise),
from the same start on the same batches, for each seed; what differs is the optimizer alone.
"""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch

from benchmarks.harness import Row
from tigerbot.models import build
from tigerbot.spec import TrainLoop
from tigerbot_jobs.train.adam8bit import state_bytes
from tigerbot_jobs.train.engine import _optimizer
from tigerbot_jobs.train.model import LanguageModel

VOCABULARY, LENGTH, SEQUENCES, STEPS, LAST = 256, 64, 8, 150, 20
SEEDS = (1, 2, 3)


def main() -> list[Row]:
    torch.set_num_threads(1)
    pairs = [(_train("adamw8bit", seed), _train("adamw", seed)) for seed in SEEDS]
    rows = []
    for index, (measure, unit, target) in enumerate(
        (
            (f"mean loss of the last {LAST} of {STEPS} steps, 8-bit moments", "", "<= 1.01"),
            ("bytes of optimizer state, 8-bit moments", "MiB", "<= 0.35"),
            ("seconds of an optimizer step, 8-bit moments", "ms", "(no target)"),
        )
    ):
        ours, theirs = ([side[index] for side in sides] for sides in zip(*pairs, strict=True))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append(
            Row(
                f"{measure}, ours / torch AdamW",
                statistics.median(ratios),
                min(ratios),
                max(ratios),
                "lower",
                target,
                len(SEEDS),
                ours=f"{statistics.median(ours):.4g} {unit}".strip(),
                stock=f"{statistics.median(theirs):.4g} {unit}".strip(),
                note=f"`tiny`, vocabulary {VOCABULARY}, float32, seeds {', '.join(map(str, SEEDS))}",
            )
        )
    return rows


@cache
def _train(optimizer: str, seed: int) -> tuple[float, float, float]:
    """(mean of the last losses, MiB of state, milliseconds of an optimizer step)."""
    module = LanguageModel(build("tiny", VOCABULARY, seed), None)
    loop = TrainLoop(tokens=1, lr=1e-3, optimizer=optimizer)  # type: ignore[arg-type]
    adam = _optimizer(module, loop)
    positions = torch.arange(LENGTH).expand(SEQUENCES, LENGTH)
    losses, seconds = [], []
    for step in range(STEPS):
        ids = _batch(seed * 100_000 + step)
        loss = module(ids, ids, positions) / (SEQUENCES * (LENGTH - 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        began = time.perf_counter()
        adam.step()
        seconds.append(time.perf_counter() - began)
        adam.zero_grad()
        losses.append(loss.item())
    last = statistics.mean(losses[-LAST:])
    print(f"  {optimizer}, seed {seed}: loss {losses[0]:.4f} -> {last:.4f}", flush=True)
    return last, state_bytes(adam) / 2**20, statistics.median(seconds) * 1e3


def _batch(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
    noise = torch.rand(SEQUENCES, LENGTH, generator=generator) < 0.125
    for at in range(2, LENGTH):
        rule = (ids[:, at - 1] % 16 * 5 + ids[:, at - 2] % 8 * 11 + 3) % VOCABULARY
        ids[:, at] = torch.where(noise[:, at], ids[:, at], rule)
    return ids


if __name__ == "__main__":
    main()

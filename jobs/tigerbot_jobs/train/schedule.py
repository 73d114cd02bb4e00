"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from tigerbot.spec import TrainLoop

FLOOR = 0.1  # cosine ends at a tenth of the peak (Hoffmann et al. 2022); WSD decays to zero (Hu et al. 2024)


def learning_rate(step: int, steps: int, loop: TrainLoop) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warmup, then the schedule."""
    warmup = max(1, round(loop.warmup_fraction * steps)) if loop.warmup_fraction else 0
    if step < warmup:
        return loop.lr * (step + 1) / warmup
    if loop.schedule == "constant":
        return loop.lr
    if loop.schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return loop.lr * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))
    decay = round(loop.decay_fraction * steps)
    left = steps - step
    return loop.lr * min(1.0, left / (decay + 1)) if decay else loop.lr

"""muTransfer's rule on small widths: the best learning rate of a narrow network, carried to wider ones.

A network of two hidden layers learns scikit-learn's digits with Adam. For each width the held-out loss is measured on a
grid of learning rates (3 seeds, paired). Regret is how much worse the loss is at the carried rate than at the grid's
best; beside it the regret of keeping the narrow network's rate as it is.
"""

from __future__ import annotations

import math
import statistics
from functools import cache

from benchmarks.harness import Row
from tigerbot_jobs.sweep.priors import mup_transfer

WIDTHS = (32, 128, 512)
RATES = tuple(10 ** (-3.75 + 0.25 * place) for place in range(13))
SEEDS = (1, 2, 3)
EPOCHS = 8


@cache
def held_out_loss(width: int, lr: float, seed: int) -> float:
    """After training; infinite where it diverged."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    torch.manual_seed(seed)
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:400], order[400:]
    layers = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch in range(EPOCHS):
        shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for rows in train[shuffled].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(x[held_out]), y[held_out]).item()
    return loss if math.isfinite(loss) else math.inf


def best_rate(width: int, seed: int) -> float:
    """Of the grid."""
    return min(RATES, key=lambda lr: held_out_loss(width, lr, seed))


def main() -> list[Row]:
    rows = []
    narrow = WIDTHS[0]
    tuned = min(RATES, key=lambda lr: statistics.mean(held_out_loss(narrow, lr, seed) for seed in SEEDS))
    for width in WIDTHS[1:]:
        carried = mup_transfer(tuned, narrow, width)
        for what, lr in (("carried by muTransfer", carried), ("kept as it is", tuned)):
            regrets = [held_out_loss(width, lr, s) / held_out_loss(width, best_rate(width, s), s) for s in SEEDS]
            rows.append(
                Row(
                    measure=f"held-out loss at width {width}, rate {what} from width {narrow} / the grid's best",
                    value=statistics.median(regrets),
                    low=min(regrets),
                    high=max(regrets),
                    better="lower",
                    target="reported",
                    rounds=len(SEEDS),
                    note=f"lr {lr:.2g}; the grid's best is {best_rate(width, SEEDS[0]):.2g} (seed {SEEDS[0]})",
                )
            )
    return rows

"""A target to try sweeps on: a small network learns scikit-learn's handwritten digits, a second or two a trial.

`jobs/sweep_digits.yaml` sweeps it. It shows all that a target can do: parameters in, a report an epoch, a state to be
resumed from.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from tigerbot_jobs.sweep.worker import Report


def digits(params: Mapping[str, Any], report: Report) -> None:
    """Reports `loss`, `accuracy` (held out) and `weights` (how many the network has) after each epoch."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    torch.manual_seed(params["seed"])
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16.0, dtype=torch.float32), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # the same split in every trial
    held_out, train = order[:400], order[400:]
    model = nn.Sequential(nn.Linear(64, params["width"]), nn.ReLU(), nn.Linear(params["width"], 10))
    momentum = params.get("momentum", 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=params["lr"], momentum=momentum, weight_decay=params["decay"])
    epoch = 0
    if report.kept is not None:
        state = torch.load(io.BytesIO(report.kept), weights_only=True)
        epoch = state["epoch"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    while epoch < params.get("epochs", 27):
        epoch += 1
        shuffled = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        for rows in train[shuffled].split(params["batch"]):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            logits = model(x[held_out])
        loss = nn.functional.cross_entropy(logits, y[held_out]).item()
        accuracy = (logits.argmax(1) == y[held_out]).float().mean().item()
        weights = sum(p.numel() for p in model.parameters())
        report({"loss": loss, "accuracy": accuracy, "weights": weights, "step": epoch})
        kept = io.BytesIO()
        torch.save({"epoch": epoch, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, kept)
        report.keep(kept.getvalue())

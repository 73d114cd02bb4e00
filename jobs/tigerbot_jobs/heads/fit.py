"""Fit a small head on hidden states, calibrate it, and say what it is worth.

p = sigmoid((w2 . relu(W1 h + b1) + b2) / temperature + bias). Temperature and bias are fitted on other entities than
the weights (Guo et al. 2017), at the base rate at which the model really errs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

ECE_BINS = 10


@dataclass(frozen=True)
class Head:
    """Weights (float32 arrays: w1 (hidden, D), b1 (hidden,), w2 (1, hidden), b2 (1,)) and calibration."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray
    temperature: float = 1.0
    bias: float = 0.0

    @property
    def width(self) -> int:
        """Numbers it reads."""
        return (self.w1 if len(self.w1) else self.w2).shape[1]

    def logits(self, states: np.ndarray) -> np.ndarray:
        """Uncalibrated logits of hidden states (tokens, D)."""
        inner = np.maximum(states @ self.w1.T + self.b1, 0.0) if len(self.w1) else states
        return (inner @ self.w2.T + self.b2)[:, 0]

    def probabilities(self, states: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(self.logits(states) / self.temperature + self.bias)))


@dataclass(frozen=True)
class Worth:
    """How well a head tells 1 from 0. `auprc` and `ece` are at `base_rate`; `placebo_auroc` had shuffled labels."""

    auroc: float
    auprc: float
    ece: float
    base_rate: float
    placebo_auroc: float
    tokens: int


def fit_head(
    states: np.ndarray, labels: np.ndarray, *, hidden: int, epochs: int, lr: float, seed: int, placebo: bool = False
) -> Head:
    """Fit on soft labels by cross-entropy; with `placebo` the labels are shuffled first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(states.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, 1)]
        network = nn.Sequential(*layers) if hidden else nn.Sequential(nn.Linear(states.shape[1], 1))
    x_nD, y_n = torch.from_numpy(states), torch.from_numpy(labels)
    if placebo:
        y_n = y_n[torch.randperm(len(y_n), generator=generator)]
    # Standardised inputs train evenly; the scale is folded back into the first layer afterwards.
    mean_D, scale_D = x_nD.mean(0), x_nD.std(0).clamp(min=1e-6)
    x_nD = (x_nD - mean_D) / scale_D
    adam = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(y_n), generator=generator).split(256):
            loss = nn.functional.binary_cross_entropy_with_logits(network(x_nD[rows])[:, 0], y_n[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
    return _folded(network, mean_D, scale_D, hidden)


def calibrated(head: Head, states: np.ndarray, labels: np.ndarray, base_rate: float) -> Head:
    """The head with temperature and bias fitted by likelihood, labels weighted to a base rate."""
    logits = torch.from_numpy(head.logits(states).astype(np.float64))
    targets = torch.from_numpy(labels.astype(np.float64))
    weights = torch.from_numpy(_weights(labels, base_rate))
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([log_temperature, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        scaled = logits * torch.exp(-log_temperature.clamp(-3, 3)) + bias
        value = nn.functional.binary_cross_entropy_with_logits(scaled, targets, weight=weights)
        value.backward()
        return value

    solver.step(loss)
    temperature = float(log_temperature.detach().clamp(-3, 3).exp())
    return Head(head.w1, head.b1, head.w2, head.b2, temperature, float(bias.detach()))


def worth(head: Head, placebo: Head, states: np.ndarray, labels: np.ndarray, base_rate: float) -> Worth:
    """Measure on states that neither fitting nor calibration saw; a soft label counts as 1 above a half."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    hard = (labels > 0.5).astype(int)
    scores = head.probabilities(states)
    weights = _weights(labels, base_rate)
    return Worth(
        auroc=float(roc_auc_score(hard, scores)),
        auprc=float(average_precision_score(hard, scores, sample_weight=weights)),
        ece=expected_calibration_error(scores, labels, weights),
        base_rate=base_rate,
        placebo_auroc=float(roc_auc_score(hard, placebo.probabilities(states))),
        tokens=len(labels),
    )


def expected_calibration_error(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """Mean distance of confidence from frequency over ten equal bins (Naeini et al. 2015), weighted."""
    bins = np.minimum((scores * ECE_BINS).astype(int), ECE_BINS - 1)
    total = 0.0
    for index in range(ECE_BINS):
        inside = bins == index
        if inside.any():
            share = weights[inside] / weights[inside].sum()
            total += weights[inside].sum() * abs(float((share * (scores[inside] - labels[inside])).sum()))
    return float(total / weights.sum())


def _weights(labels: np.ndarray, base_rate: float) -> np.ndarray:
    """Weights under which the mean label is the base rate."""
    mean = float(np.clip(labels.mean(), 1e-6, 1 - 1e-6))
    up, down = base_rate / mean, (1 - base_rate) / (1 - mean)
    return labels.astype(np.float64) * up + (1 - labels.astype(np.float64)) * down


def _folded(network: nn.Sequential, mean_D: Tensor, scale_D: Tensor, hidden: int) -> Head:
    first = network[0]
    assert isinstance(first, nn.Linear)
    weight = (first.weight / scale_D).detach()
    bias = (first.bias - weight @ mean_D).detach()
    if not hidden:
        empty = np.zeros((0, len(mean_D)), dtype=np.float32)
        return Head(empty, np.zeros(0, dtype=np.float32), weight.numpy(), bias.numpy())
    last = network[2]
    assert isinstance(last, nn.Linear)
    return Head(weight.numpy(), bias.numpy(), last.weight.detach().numpy(), last.bias.detach().numpy())

"""A rank's master weights as one vector of its slices, addressed by parameter name. Read and written, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tigerbot_jobs.train.shard import Slice


class Trainable(Protocol):
    """What is needed of an engine. `state` holds a flat tensor `{group}.master` for every group of the slices, which may be written;
    `settle` then carries it into the weights that the forward pass reads."""

    device: torch.device

    @property
    def zero_stage(self) -> int: ...

    def slices(self) -> list[Slice]: ...

    def state(self) -> dict[str, Tensor]: ...

    def settle(self, *, step: int) -> None: ...


def read(engine: Trainable, held: Sequence[Slice]) -> np.ndarray:
    """A copy of the slices' values, one after another, float32."""
    state = engine.state()
    parts = [_part(state, part).cpu().numpy() for part in held]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def write(engine: Trainable, held: Sequence[Slice], values: np.ndarray, *, step: int) -> None:
    """Collective. Put the slices' values back, and carry them into the weights that the forward pass reads."""
    state = engine.state()
    given, at = torch.from_numpy(values), 0
    for part in held:
        _part(state, part).copy_(given[at : at + part.numel])
        at += part.numel
    engine.settle(step=step)


def _part(state: dict[str, Tensor], part: Slice) -> Tensor:
    return state[f"{part.group}.master"].view(-1)[part.offset : part.offset + part.numel]

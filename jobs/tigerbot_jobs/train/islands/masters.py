"""A rank's master weights as one vector of its slices, addressed by parameter name. Read and written, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tigerbot.errors import SpecError


@dataclass(frozen=True)
class Slice:
    """`numel` values from `start` of the flattened parameter lie at `offset` of this rank's flat tensor `group`."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    group: int
    offset: int


class Trainable(Protocol):
    """What is needed of an engine. `state` holds a flat tensor `{group}.master` for every group of the slices."""

    device: torch.device

    @property
    def zero_stage(self) -> int: ...

    def slices(self) -> list[Slice]: ...

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor], *, step: int) -> None: ...


def slices(engine: Any) -> list[Slice]:
    """What a rank of a DeepSpeed engine holds, in the order of its flat tensors.

    Raises:
        SpecError: ZeRO-3.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 3:
        raise SpecError("islands want ZeRO 0, 1 or 2", where="deepspeed.zero_stage", fix="use zero_stage: 2")
    if stage == 0:
        whole = [p for group in engine.optimizer.param_groups for p in group["params"]]
        return [Slice(names[id(p)], tuple(p.shape), 0, p.numel(), index, 0) for index, p in enumerate(whole)]
    found = []
    for index, group in enumerate(engine.optimizer.bit16_groups):
        for p in group:
            if p._hp_mapping is not None:  # None: this rank holds none of it
                inside, flat = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                found.append(Slice(names[id(p)], tuple(p.shape), inside.start, flat.numel, index, flat.start))
    return sorted(found, key=lambda part: (part.group, part.offset))


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
    engine.restore(state, step=step)


def _part(state: dict[str, Tensor], part: Slice) -> Tensor:
    return state[f"{part.group}.master"].view(-1)[part.offset : part.offset + part.numel]

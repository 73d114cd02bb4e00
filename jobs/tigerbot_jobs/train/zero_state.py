"""Where DeepSpeed 0.19.8 keeps the state of a rank: the one file that reaches into its private names.

A rank's state is a few flat float32 tensors (its part of the master weights) and, for each, Adam's two moments and
step count. Stage 0 has one flat tensor a parameter, stages 1 and 2 one a parameter group, stage 3 one a sub-group.
Copied out and in without a collective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Flat:
    """One flat master tensor and the optimizer's own dict for it."""

    master: Tensor
    adam: dict[str, Any]


def flats(engine: Any) -> list[Flat]:
    """This rank's flat tensors, in an order that the model and the world size fix."""
    zero, adam = engine.optimizer, engine.optimizer
    stage = engine.zero_optimization_stage()
    if stage == 0:
        masters = [p for group in adam.param_groups for p in group["params"]]
    else:
        adam = zero.optimizer
        masters = list(zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups)
    return [Flat(master, adam.state[master]) for master in masters]


def read_state(engine: Any) -> dict[str, Tensor]:
    """The state as named tensors, on the CPU. They share memory with the engine's where that is on the CPU."""
    state: dict[str, Tensor] = {}
    for index, flat in enumerate(flats(engine)):
        state[f"{index}.master"] = flat.master.detach().cpu()
        for name in _MOMENTS:
            moment = flat.adam.get(name)
            state[f"{index}.{name}"] = torch.zeros_like(flat.master).cpu() if moment is None else moment.cpu()
        state[f"{index}.step"] = torch.as_tensor(flat.adam.get("step", 0.0)).reshape(1).float().cpu()
    return state


@torch.no_grad()
def write_state(engine: Any, state: dict[str, Tensor], *, step: int) -> None:
    """Put a state back, and set the counters DeepSpeed decides its accumulation boundaries by.

    The optimizer takes the moments' tensors over as they are: a state is put back once.
    """
    for index, flat in enumerate(flats(engine)):
        flat.master.copy_(state[f"{index}.master"].view_as(flat.master))
        for name in _MOMENTS:
            flat.adam[name] = state[f"{index}.{name}"].to(flat.master.device).view_as(flat.master)
        # Adam's state does not exist before the first step; fused Adam wants its step count on the device.
        flat.adam["step"] = state[f"{index}.step"].to(flat.master.device).reshape(()).clone()
    _refresh_weights(engine)
    engine.global_steps = step
    engine.micro_steps = step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()


def _refresh_weights(engine: Any) -> None:
    """Carry the master weights over into the weights that the forward pass reads."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        for index, master in enumerate(zero.fp32_partitioned_groups_flat):
            zero.fp16_partitioned_groups_flat[index].copy_(master)
            pieces = zero.unflatten(zero.fp16_partitioned_groups_flat[index], zero.fp16_partitioned_groups[index])
            for piece, value in zip(zero.fp16_partitioned_groups[index], pieces, strict=True):
                piece.data = value.data

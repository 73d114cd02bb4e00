"""AdamW whose two moments take one byte a value: blocks of 256, each with a scale (Dettmers et al. 2021, 2110.02861).

The arithmetic is torch's own fused AdamW over a piece of a flat tensor at a time, its moments brought to float32 for
that piece alone. The first moment is kept on the paper's signed map; of the second its square root is kept, which needs
half the range, on a map without zero: a denominator that vanishes beside a numerator that does not would be a step of
any size. Parameter groups with `bits: 32` keep float32 moments: embeddings, as in the paper, and vectors.

It knows nothing about ZeRO: a flat partition of a group is a parameter like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

BLOCK = 256
FLOAT_NAMES = ("exp_avg", "exp_avg_sq")
_CODES, _SCALES = "_codes", "_scales"
# Values brought to float32 at once: a CPU's caches, a GPU's width.
_CPU_PIECE = 2**17
_GPU_PIECE = 2**24


class AdamW8bit(torch.optim.Optimizer):
    """AdamW over parameters of any shape. `bits` of a parameter group is 8 (if absent) or 32.

    State of an 8-bit parameter: `exp_avg_codes`, `exp_avg_sq_codes` (uint8, one a value, flat), `exp_avg_scales`,
    `exp_avg_sq_scales` (float32, one a block) and `step`. It is a function of the gradients alone: no chance, no clock.
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bits": 8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state |= fresh_moments(param, bits=group["bits"])
        values, grads = param.view(-1), param.grad.reshape(-1)  # type: ignore[union-attr]
        done: Tensor = state["step"]
        if group["bits"] == 32:
            _adamw(values, grads, state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1), done, group)
        else:
            size = _piece(param.device)
            for begin in range(0, param.numel(), size):
                piece = slice(begin, begin + size)
                first, second = (unpack(state, name, piece) for name in FLOAT_NAMES)
                _adamw(values[piece], grads[piece], first, second, done.clone(), group)
                _pack_into(state, "exp_avg", piece, first)
                _pack_into(state, "exp_avg_sq", piece, second)
            done += 1


def _adamw(values: Tensor, grads: Tensor, first: Tensor, second: Tensor, step: Tensor, group: dict[str, Any]) -> None:
    adamw(
        [values],
        [grads],
        [first],
        [second],
        [],
        [step],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def fresh_moments(param: Tensor, *, bits: int) -> dict[str, Tensor]:
    """The state before the first step."""
    state = {"step": torch.zeros((), device=param.device)}
    if bits == 32:
        return state | {name: torch.zeros_like(param, dtype=torch.float32) for name in FLOAT_NAMES}
    blocks = -(-param.numel() // BLOCK)
    for name in FLOAT_NAMES:
        state[name + _CODES] = torch.zeros(param.numel(), dtype=torch.uint8, device=param.device)
        state[name + _SCALES] = torch.zeros(blocks, device=param.device)
    return state


def unpack(state: dict[str, Tensor], name: str, piece: slice = slice(None)) -> Tensor:
    """Values of a moment as float32; `piece` begins at the begin of a block."""
    codes = state[name + _CODES][piece]
    begin = piece.start or 0
    scales = state[name + _SCALES][begin // BLOCK : -(-(begin + len(codes)) // BLOCK)]
    values = _table(name, codes.device)[0].index_select(0, codes.to(torch.int32))
    _by_block(values, scales)
    return values.square_() if name == "exp_avg_sq" else values


def _pack_into(state: dict[str, Tensor], name: str, piece: slice, values: Tensor) -> None:
    """Keep a piece of a moment; `values` is used up."""
    begin = piece.start or 0
    if name == "exp_avg_sq":
        values.sqrt_()
    blocks = -(-len(values) // BLOCK)
    scales = _largest(values)
    state[name + _SCALES][begin // BLOCK : begin // BLOCK + blocks] = scales
    _by_block(values, scales.clamp(min=torch.finfo(torch.float32).tiny).reciprocal_())
    nearest = _table(name, values.device)[1]
    state[name + _CODES][piece] = nearest.index_select(0, _as_index(values))

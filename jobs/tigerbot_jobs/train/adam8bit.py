"""AdamW whose two moments take one byte a value: blocks of 256, each with a scale (Dettmers et al. 2021, 2110.02861).

The arithmetic is torch's own fused AdamW over a piece of a flat tensor at a time, whose moments are brought to float32
for that piece alone. The first moment is on the paper's signed map. Of the second its square root is kept, which needs
half the range, on a map without zero: a denominator that vanished beside a numerator that did not would make a step of
any size. Parameter groups with `bits: 32` keep float32 moments: embeddings, as in the paper, and vectors.

It knows nothing about ZeRO: a flat partition of a group is a parameter like any other. Blocks are counted from the begin
of a flat tensor, so a state that is cut anew is rounded anew; put back as it was, it is the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

BLOCK = 256
MOMENTS = ("exp_avg", "exp_avg_sq")
# Values that are float32 at a time: a CPU's caches, a GPU's width. Whole blocks.
_CPU_PIECE = 2**17
_GPU_PIECE = 2**24


class AdamW8bit(torch.optim.Optimizer):
    """AdamW over parameters of any shape. `bits` of a parameter group is 8 (where absent) or 32.

    State of an 8-bit parameter, for both moments: `exp_avg.codes` (uint8, one a value, flat) and `exp_avg.scales`
    (float32, one a block); and `step`. It follows from the gradients alone: nothing is rounded by chance.
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
                    _update(param, moments_of(self, param, group), group)


def moments_of(optimizer: torch.optim.Optimizer, flat: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The optimizer's own tensors of a parameter by name, to be read or written in place. Zeros before the first step.

    Also for torch's AdamW, whose groups have no `bits`: it then holds `exp_avg`, `exp_avg_sq` and `step`.
    """
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.zeros((), device=flat.device)
        for name in MOMENTS:
            if group.get("bits", 32) == 32:
                state[name] = torch.zeros_like(flat, dtype=torch.float32)
            else:
                state[f"{name}.codes"] = torch.zeros(flat.numel(), dtype=torch.uint8, device=flat.device)
                state[f"{name}.scales"] = torch.zeros(-(-flat.numel() // BLOCK), device=flat.device)
    return state


@torch.no_grad()
def put_moments(
    optimizer: torch.optim.Optimizer, flat: Tensor, group: dict[str, Any], moments: dict[str, Tensor]
) -> None:
    """Write a parameter's moments over: bit for bit if they have the names they are kept under, else from float32."""
    state = moments_of(optimizer, flat, group)
    for name, kept in state.items():
        if name in moments:
            kept.copy_(moments[name].view_as(kept))
    for name in MOMENTS:
        if name in moments and name not in state:
            values = moments[name].view(-1)
            for piece in _pieces(flat):
                _pack(state, name, piece, values[piece].to(flat.device, torch.float32, copy=True))


def as_float(moments: dict[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Values `start .. stop` of a moment as float32, flat, whichever way it is kept."""
    if name in moments:
        return moments[name].view(-1)[start:stop].float()
    begin = start // BLOCK * BLOCK
    return _unpack(moments, name, slice(begin, stop))[start - begin :]


def with_bits(groups: list[dict[str, Any]], module: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups cut by how their moments are kept, so that ZeRO, which flattens groups, never mixes the two."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    found = []
    for group in groups:
        exact = [p for p in group["params"] if id(p) in tables or len(getattr(p, "ds_shape", p.shape)) < 2]
        small = [p for p in group["params"] if all(p is not other for other in exact)]
        found += [group | {"params": params, "bits": bits} for params, bits in ((small, 8), (exact, 32)) if params]
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer holds besides the parameters."""
    return sum(kept.numel() * kept.element_size() for state in optimizer.state.values() for kept in state.values())


def _update(param: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
    assert param.grad is not None
    values, grads, step = param.view(-1), param.grad.reshape(-1), state["step"]
    if MOMENTS[0] in state:
        _adamw(values, grads, [state[name].view(-1) for name in MOMENTS], step, group)
        return
    for piece in _pieces(param):
        moments = [_unpack(state, name, piece) for name in MOMENTS]
        _adamw(values[piece], grads[piece], moments, step.clone(), group)
        for name, moment in zip(MOMENTS, moments, strict=True):
            _pack(state, name, piece, moment)
    step += 1


def _adamw(values: Tensor, grads: Tensor, moments: list[Tensor], step: Tensor, group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    settings = {name: group[name] for name in ("lr", "weight_decay", "eps")}
    first, second = ([moment] for moment in moments)
    adamw(
        [values], [grads], first, second, [], [step],
        fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, **settings,
    )  # fmt: skip


def _pieces(flat: Tensor) -> list[slice]:
    size = _CPU_PIECE if flat.device.type == "cpu" else _GPU_PIECE
    return [slice(begin, min(begin + size, flat.numel())) for begin in range(0, flat.numel(), size)]


def _unpack(state: dict[str, Tensor], name: str, piece: slice) -> Tensor:
    """A piece of a moment as float32; it begins with a block."""
    codes, scales = state[f"{name}.codes"][piece], state[f"{name}.scales"][_blocks(piece)]
    values = _maps(name, codes.device)[0].index_select(0, codes.to(torch.int32))
    _times(values, scales)
    return values.square_() if name == "exp_avg_sq" else values


def _pack(state: dict[str, Tensor], name: str, piece: slice, values: Tensor) -> None:
    """Keep a piece of a moment; `values` is used up."""
    if name == "exp_avg_sq":
        values.sqrt_()
    scales = _largest(values)
    _times(values, scales.clamp(min=torch.finfo(torch.float32).tiny).reciprocal_())
    # Nearest codes by a table over all float16: a search of the map costs fifty times as much.
    at = values.to(torch.float16).view(torch.int16).to(torch.int32).add_(2**15)
    state[f"{name}.codes"][piece] = _maps(name, values.device)[1].index_select(0, at)
    state[f"{name}.scales"][_blocks(piece)] = scales


def _blocks(piece: slice) -> slice:
    return slice(piece.start // BLOCK, -(-piece.stop // BLOCK))


def _times(values: Tensor, scales: Tensor) -> None:
    """Every block times its scale, in place; the last one may be short."""
    whole = len(values) // BLOCK
    values[: whole * BLOCK].view(whole, BLOCK).mul_(scales[:whole, None])
    values[whole * BLOCK :].mul_(scales[whole:])


def _largest(values: Tensor) -> Tensor:
    """Absolute maximum of every block."""
    whole = len(values) // BLOCK
    largest = values[: whole * BLOCK].view(whole, BLOCK).abs().amax(1)
    rest = values[whole * BLOCK :]
    return torch.cat([largest, rest.abs().amax(0, keepdim=True)]) if len(rest) else largest


@cache
def _maps(name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """(values of the 256 codes, code of every float16 in the order of its bits as int16).

    Between 10^-k and 10^-(k-1) there are twice as many values as in the decade below: fine where a block's largest
    values are, and still something seven decades down.
    """
    signed = name == "exp_avg"
    decades = [
        torch.linspace(0.1, 1, 2 ** (k + (not signed)) + 1, dtype=torch.float64)[1:] * 10.0 ** (k - 6) for k in range(7)
    ]
    positive = torch.cat(decades)
    if signed:
        values = torch.cat([-positive.flip(0), torch.zeros(1), positive, torch.ones(1)])
    else:
        values = torch.cat([torch.tensor([2e-7, 4e-7]), positive])
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
    codes = torch.bucketize(halves.nan_to_num(0.0), (values[1:] + values[:-1]) / 2)
    return values.float().to(device), codes.to(torch.uint8).to(device)

"""A linear in the form in which its device multiplies few rows fastest.

On a CPU oneDNN multiplies 4 to 32 rows with a packed float32 matrix in half the time that torch's own linear takes
(docs/engine.md), so decoding packs every matrix once, at load. Fewer rows than four take longer than four, which have a
better kernel: they are filled up. A GPU, and a CPU without oneDNN, take the plain matrix.

Legend: N rows, i and o a linear's input and output width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tigerbot.int8 import Int8Linear

Matrix = Callable[[Tensor], Tensor]

_FEW = 4


class Packed:
    """A linear whose matrix oneDNN has laid out for itself."""

    def __init__(self, weight_oi: Tensor, bias_o: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight_oi.detach(), None)
        self._bias_o = None if bias_o is None else bias_o.detach()

    def __call__(self, x_Ni: Tensor) -> Tensor:
        rows = len(x_Ni)
        if rows < _FEW:
            x_Ni = nn.functional.pad(x_Ni, (0, 0, 0, _FEW - rows))
        return torch.ops.mkldnn._linear_pointwise(x_Ni, self._weight, self._bias_o, "none", [], "")[:rows]


class Plain:
    """torch's own linear."""

    def __init__(self, weight_oi: Tensor, bias_o: Tensor | None) -> None:
        self._weight_oi = weight_oi.detach()
        self._bias_o = None if bias_o is None else bias_o.detach()

    def __call__(self, x_Ni: Tensor) -> Tensor:
        return nn.functional.linear(x_Ni, self._weight_oi, self._bias_o)


def matrix(weights: Sequence[Tensor], biases: Sequence[Tensor | None], *, int8: bool = False) -> Matrix:
    """Linears of one input, with weights (o, i), as one linear that gives their outputs side by side.

    Raises:
        ModelError: int8, and this processor has no kernels for it.
    """
    weight_oi = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    bias_o = None
    if any(bias is not None for bias in biases):
        parts = zip(weights, biases, strict=True)
        bias_o = torch.cat([w.new_zeros(len(w)) if bias is None else bias for w, bias in parts])
    if int8:
        return Int8Linear(weight_oi, bias_o)
    return Packed(weight_oi, bias_o) if _packs(weight_oi) else Plain(weight_oi, bias_o)


def _packs(weight_oi: Tensor) -> bool:
    if weight_oi.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight_oi.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_oi.dtype == torch.float32

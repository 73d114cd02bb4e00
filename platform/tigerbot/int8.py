"""Linears in int8 for CPU inference: weights by output channel, activations by row while it runs.

Every row has its own scale, so that its numbers do not depend on what is decoded beside it: the dial's ends and a seed
hold in int8 as they do in float32. A row is brought to [-1, 1], multiplied in integers by FBGEMM, and scaled back.
Training's jobs read hidden states through the same linears that serve them, since heads belong to a quantisation.

Legend: N rows, i and o a linear's input and output width.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tigerbot.errors import ModelError

_ZERO_POINT = 128
_NO_ZERO = 1e-12  # a row of zeros stays zeros


class Int8Linear(nn.Module):
    """A linear with int8 weights; takes and gives float32.

    Raises:
        ModelError: this processor or torch has no int8 kernels.
    """

    def __init__(self, weight_oi: Tensor, bias_o: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_oi.shape
        self._packed = _packed(weight_oi.detach().float())
        self._bias_o = None if bias_o is None else bias_o.detach().float()
        # Without VNNI the kernel adds pairs of products in 16 bits: 7-bit activations cannot overflow them.
        self._step = 1 / (127 if torch.cpu._is_vnni_supported() else 63)

    def forward(self, x: Tensor) -> Tensor:
        x_Ni = x.reshape(-1, self.in_features)
        size_N1 = torch.linalg.vector_norm(x_Ni, math.inf, dim=-1, keepdim=True).clamp_(min=_NO_ZERO)
        out_No = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x_Ni / size_N1, self._step, _ZERO_POINT, self._packed
        ).mul_(size_N1)
        if self._bias_o is not None:
            out_No += self._bias_o
        return out_No.view(*x.shape[:-1], self.out_features)


def quantise(model: Any) -> Any:
    """Every linear of the decoder's layers in int8, in place; embedding, norms and output matrix stay float32.

    Adapters of peft are left as they are, on top of the quantised base.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in f".{name}" and ".lora_" not in name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int8Linear(module.weight, module.bias))
    return model


def _packed(weight_oi: Tensor) -> Any:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        raise ModelError("has no int8 kernels for this processor", where="torch", fix="use float32")
    scale_o = (weight_oi.abs().amax(dim=1) / 127).clamp(min=_NO_ZERO).double()
    with warnings.catch_warnings(), _engine("fbgemm"):
        warnings.filterwarnings("ignore", message=".*quantize_per_channel.*")
        zeros_o = torch.zeros(len(scale_o), dtype=torch.long)
        quantised_oi = torch.quantize_per_channel(weight_oi, scale_o, zeros_o, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(quantised_oi, None)


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """Weights are packed for the engine that is set; multiplying needs none."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before

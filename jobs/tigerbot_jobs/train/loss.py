"""Cross-entropy after an output matrix without the logits: chunk by chunk of tokens, gradients on the way.

A chunk's logits live until its loss and its part of the gradients are summed, so that memory does not grow with tokens
x vocabulary (Hsu et al. 2024, arXiv 2410.10989). Nothing is computed twice. It knows nothing about decoders or labels.

Shapes: x tokens, c tokens of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Of float32 logits in a chunk. A CPU is fastest while a chunk is near its caches; a GPU needs long matrix products.
_CPU_CHUNK_BYTES = 2**25
_GPU_CHUNK_BYTES = 2**29


class OutputLoss(nn.Module):
    """Sum of cross-entropies behind an output matrix, whose parameters it shares.

    It is a module because ZeRO-3 brings parameters together only around the forward and backward of a module that has
    them: where the output matrix is partitioned, its weight outside of them is empty.
    """

    def __init__(self, output: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = output.weight, output.bias

    def forward(self, hidden_xD: Tensor, targets_x: Tensor) -> Tensor:
        """float32. The matrix products run in autocast's dtype, or in the weights' own; softmax in float32."""
        kind = hidden_xD.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        with torch.autocast(kind, enabled=False):
            loss: Any = _ChunkedLoss.apply(hidden_xD, self.weight, self.bias, targets_x, dtype, torch.is_grad_enabled())
        return loss


def output_loss(output: nn.Module) -> OutputLoss | None:
    """The loss behind an output matrix; None where it does more than one product (adapters, quantised weights)."""
    return OutputLoss(output) if type(output) is nn.Linear else None


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens of a chunk. By vocabulary and device alone, so that a sum is made in the same order in every run."""
    size_bytes = _CPU_CHUNK_BYTES if device.type == "cpu" else _GPU_CHUNK_BYTES
    return max(1, size_bytes // (4 * vocabulary))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_xD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_x: Tensor,
        dtype: torch.dtype,
        learns: bool,
    ) -> Tensor:
        for_hidden, for_weight, for_bias = (learns and needed for needed in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden_xD) if for_hidden else None
        # Sums over chunks are float32 whatever the products are in.
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if for_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=torch.float32) if for_bias and bias_V is not None else None
        weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        loss_x = torch.empty(len(hidden_xD), dtype=torch.float32, device=hidden_xD.device)
        size = chunk_tokens(len(weight), hidden_xD.device)
        for begin in range(0, len(hidden_xD), size):
            chunk = slice(begin, begin + size)
            hidden_cD, targets_c = hidden_xD[chunk].to(dtype), targets_x[chunk]
            rows_c = torch.arange(len(targets_c), device=targets_c.device)
            logs_cV = nn.functional.linear(hidden_cD, weight, bias).float().log_softmax(-1)
            loss_x[chunk] = -logs_cV[rows_c, targets_c]
            if not (for_hidden or for_weight or for_bias):
                continue
            grad_cV = logs_cV.exp_()
            grad_cV[rows_c, targets_c] -= 1
            if grad_bias is not None:
                grad_bias += grad_cV.sum(0)
            grad_cV = grad_cV.to(dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad_cV @ weight
            if grad_weight is not None:
                _add_product(grad_weight, grad_cV, hidden_cD)
        ctx.found = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = hidden_xD.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype
        return loss_x.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if ctx.found is None:
            raise RuntimeError("the gradients of this loss were handed out: it cannot be differentiated a second time")
        found, ctx.found = ctx.found, None
        # In place: a second gradient of the output matrix beside the first may be gigabytes.
        scaled = [
            None if grad is None else grad.mul_(grad_outputs[0]).to(dtype)
            for grad, dtype in zip(found, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def _add_product(total_VD: Tensor, grad_cV: Tensor, hidden_cD: Tensor) -> None:
    """total += grad.T @ hidden, in float32 though the product is in another dtype."""
    if grad_cV.dtype == total_VD.dtype:
        total_VD.addmm_(grad_cV.T, hidden_cD)
        return
    # A few rows at a time: the whole product would be another (V, D) beside the sum.
    rows = chunk_tokens(total_VD.shape[1], total_VD.device)
    for begin in range(0, len(total_VD), rows):
        total_VD[begin : begin + rows] += grad_cV[:, begin : begin + rows].T @ hidden_cD

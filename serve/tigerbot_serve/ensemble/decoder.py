"""The forward pass of a Llama-like decoder over cached rows, laid out for few tokens of many rows.

Weights, config and rotary angles are those of a transformers model; the pass is our own, because decoding a token is
bound by how often weights are read and by what Python does between kernels: q, k and v are one matrix, gate and up
another, keys and values are written at once, and layers that both experts have in common run once for both. Models
that are not Llama-like take `stock.py`. docs/engine.md says what each saving is worth.

Legend: R rows, T new tokens a row, N = R T, d hidden width, H heads, K key-value heads, G = H / K, D head width,
L cached positions, m the MLP's width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tigerbot_serve.engine.kv_cache import KVCache
from tigerbot_serve.ensemble.lora import Adapters, Split
from tigerbot_serve.ensemble.matrix import Matrix, matrix
from tigerbot_serve.ensemble.twins import Twins

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer"}
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}  # angles that depend on the position alone


def llama_like(model: Any) -> bool:
    """Whether this module's forward is the model's own: RMS norms, rotary angles, SiLU-gated MLP, full attention."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        type(model.model.layers[0]).__name__ in _LAYERS
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") in _FIXED_ROPE
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))
    )


@dataclass(frozen=True)
class _Layer:
    norm_d: Tensor
    qkv: Matrix
    out: Matrix
    mlp_norm_d: Tensor
    gate_up: Matrix
    down: Matrix


class LlamaDecoder:
    """A transformers model's layers, taken over: the model keeps its embedding and its norms and loses its linears.

    Args:
        adapters: two experts' updates of it, when it is the base of both.
        int8: its linears in int8; on a CPU only.
    """

    def __init__(self, model: Any, adapters: Adapters | None = None, *, int8: bool = False) -> None:
        decoder, config = model.model, model.config
        self.config, self.dtype, self.device = config, model.dtype, str(model.device)
        self._adapters = adapters
        attention = decoder.layers[0].self_attn
        self._width: int = attention.head_dim
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._scale: float = attention.scaling
        self._rms = _RmsNorm(config.hidden_size, config.rms_norm_eps, decoder.norm.weight)
        self._embedding_Vd: Tensor = decoder.embed_tokens.weight
        self._norm_d = self._rms.weight(decoder.norm)
        self._rotary, self._angles_L2D = decoder.rotary_emb, torch.empty(0)
        self._layers = []
        for index in range(len(decoder.layers)):
            self._layers.append(self._taken(decoder.layers[index], f"model.layers.{index}", int8))
            decoder.layers[index] = nn.Identity()  # its weights are packed by now: they need not be there twice
        self._first_adapted = adapters.first_layer if adapters else 0

    @property
    def shares_layers(self) -> bool:
        """Whether there are layers that twins can run as one row."""
        return self._first_adapted > 0

    @property
    def split(self) -> Split | None:
        """Which rows of a step are whose; None where there is nothing to tell apart."""
        return self._adapters.split if self._adapters else None

    def forward(self, cache: KVCache, ids_RT: Tensor, counts: Sequence[int], twins: Twins | None) -> Tensor:
        """Final normed states (R, T, d) of the step that `cache.begin` has begun."""
        if self._adapters is not None:
            self._adapters.split.begin(*counts)
        rows, tokens = ids_RT.shape
        whole = _Pass(self._rope(cache), _mask(cache, tokens), cache.runs, tokens, None)
        step = whole
        if twins is not None:
            step = whole.once(twins)
            ids_RT = ids_RT[twins.keep_U]
        h_Nd = nn.functional.embedding(ids_RT.flatten(), self._embedding_Vd)
        for index, layer in enumerate(self._layers):
            if twins is not None and index == self._first_adapted:
                h_Nd = h_Nd.view(-1, tokens, h_Nd.shape[-1]).index_select(0, twins.take_R).flatten(0, 1)
                step = whole
            qkv_No = layer.qkv(self._rms(h_Nd, layer.norm_d))
            h_Nd += layer.out(self._attention(cache, index, qkv_No, step))
            gate_Nm, up_Nm = layer.gate_up(self._rms(h_Nd, layer.mlp_norm_d)).chunk(2, dim=-1)
            h_Nd += layer.down(nn.functional.silu(gate_Nm).mul_(up_Nm))
        return self._rms(h_Nd, self._norm_d).view(rows, tokens, -1)

    def _attention(self, cache: KVCache, index: int, qkv_No: Tensor, step: _Pass) -> Tensor:
        tokens, heads, kv_heads, width = step.tokens, self._heads, self._kv_heads, self._width
        turned_NHD = qkv_No[:, : (heads + kv_heads) * width].view(len(qkv_No), -1, width)
        halves_NHD = turned_NHD.roll(width // 2, -1)
        turned_NHD.mul_(step.angles_N2D[:, :1]).addcmul_(halves_NHD, step.angles_N2D[:, 1:])
        new_RT2KD = qkv_No[:, heads * width :].view(-1, tokens, 2, kv_heads, width)
        cache.put(index, new_RT2KD if step.take_R is None else new_RT2KD.index_select(0, step.take_R))
        q_No = qkv_No[:, : heads * width]
        if tokens == 1:  # the heads of a group stand where tokens would: no key is repeated
            q_RHTD = q_No.view(-1, kv_heads, heads // kv_heads, width)
        else:
            q_RHTD = q_No.view(-1, tokens, heads, width).transpose(1, 2)
        found, row = [], 0
        for low, high in step.runs:
            rows = slice(row, row + high - low)
            row = rows.stop
            mask = step.mask_R1TL if step.mask_R1TL is None or len(step.mask_R1TL) == 1 else step.mask_R1TL[rows]
            found.append(
                nn.functional.scaled_dot_product_attention(
                    q_RHTD[rows],
                    cache.keys[index][low:high, :, : cache.length],
                    cache.values[index][low:high, :, : cache.length],
                    attn_mask=mask,
                    scale=self._scale,
                    enable_gqa=tokens > 1 and heads != kv_heads,
                )
            )
        seen_RHTD = found[0] if len(found) == 1 else torch.cat(found)
        return (seen_RHTD if tokens == 1 else seen_RHTD.transpose(1, 2)).reshape(len(qkv_No), -1)

    def _rope(self, cache: KVCache) -> Tensor:
        """Cosine and signed sine (N, 2, D) of the step's positions."""
        if len(self._angles_L2D) < cache.length:
            # The tables grow by doubling: a config may allow more positions than anybody sends.
            length = max(256, 2 * cache.length)
            every_1L = torch.arange(length, device=self.device)[None]
            cos_1LD, sin_1LD = self._rotary(torch.empty(0, dtype=self.dtype, device=self.device), every_1L)
            half = self._width // 2
            signed_LD = torch.cat((-sin_1LD[0, :, :half], sin_1LD[0, :, half:]), dim=-1)
            self._angles_L2D = torch.stack((cos_1LD[0], signed_LD), dim=1)
        return self._angles_L2D.index_select(0, cache.positions_RT.flatten())

    def _taken(self, layer: Any, name: str, int8: bool) -> _Layer:
        def one(*paths: str) -> Matrix:
            linears: dict[str, Any] = {f"{name}.{path}": layer.get_submodule(path) for path in paths}
            weights, biases = [x.weight for x in linears.values()], [x.bias for x in linears.values()]
            if self._adapters is None:
                return matrix(weights, biases, int8=int8)
            down_ri = None if int8 else self._adapters.down(linears)  # adapters are not quantised
            if down_ri is not None:
                weights, biases = [*weights, down_ri.to(weights[0])], [*biases, None]
            made = matrix(weights, biases, int8=int8)
            return self._adapters.paired(made, linears, folded=down_ri is not None)

        return _Layer(
            self._rms.weight(layer.input_layernorm),
            one("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            one("self_attn.o_proj"),
            self._rms.weight(layer.post_attention_layernorm),
            one("mlp.gate_proj", "mlp.up_proj"),
            one("mlp.down_proj"),
        )


@dataclass(frozen=True)
class _Pass:
    """What every layer of a step has in common: angles, mask, runs of cache rows that attend, tokens a row, and which
    of the running rows each row of the cache takes its keys and values from (None: its own)."""

    angles_N2D: Tensor
    mask_R1TL: Tensor | None
    runs: tuple[tuple[int, int], ...]
    tokens: int
    take_R: Tensor | None

    def once(self, twins: Twins) -> _Pass:
        """The pass over one row of every pair."""
        angles_RT2D = self.angles_N2D.view(len(twins.take_R), self.tokens, 2, -1)
        mask = self.mask_R1TL
        return _Pass(
            angles_RT2D[twins.keep_U].flatten(0, 1),
            mask if mask is None or len(mask) == 1 else mask[twins.keep_U],
            tuple((self.runs[0][0] + low, self.runs[0][0] + high) for low, high in twins.runs),
            self.tokens,
            twins.take_R,
        )


def _mask(cache: KVCache, tokens: int) -> Tensor | None:
    return None if cache.even and tokens == 1 else cache.mask()


class _RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight, in four kernels where the dtype is float32, as transformers has it else."""

    def __init__(self, width: int, eps: float, like: Tensor) -> None:
        self._root, self._eps = math.sqrt(width), eps
        self._floor = like.new_tensor(math.sqrt(width * eps)) if like.dtype == torch.float32 else None

    def weight(self, norm: Any) -> Tensor:
        return norm.weight * self._root if self._floor is not None else norm.weight

    def __call__(self, x_Nd: Tensor, weight_d: Tensor) -> Tensor:
        if self._floor is not None:
            size_N1 = torch.linalg.vector_norm(x_Nd, dim=-1, keepdim=True)
            return (x_Nd / torch.hypot(size_N1, self._floor)).mul_(weight_d)
        wide_Nd = x_Nd.float()
        scale_N1 = torch.rsqrt(wide_Nd.square().mean(-1, keepdim=True) + self._eps)
        return weight_d * (wide_Nd * scale_N1).to(x_Nd.dtype)

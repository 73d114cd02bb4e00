"""Two LoRA experts on one base, stepped as one batch.

Every adapted linear runs its base matrix once over all rows; each row then gets its own expert's low-rank update. Both
experts' factors are stacked, and a mask over the rank zeroes the other expert's part, so any split of the rows costs
the same three small products and no gather. Merging the adapters instead would make two full models.

Legend: R rows, T tokens, i and o a linear's input and output width, r ranks of both experts together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tigerbot.errors import ModelError

_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out")


class Split:
    """Which rows of the step are whose: the first `creative` rows are the creative member's."""

    def __init__(self) -> None:
        self.creative = self.rows = 0
        self._bare = False
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def begin(self, creative: int, factual: int) -> None:
        if (creative, creative + factual) != (self.creative, self.rows):
            self.creative, self.rows = creative, creative + factual
            self._masks.clear()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Rows are nobody's inside: the base alone reads them."""
        self._bare = True
        self._masks.clear()
        try:
            yield
        finally:
            self._bare = False
            self._masks.clear()

    def mask(self, ranks: tuple[int, ...], like: Tensor) -> Tensor:
        """Ones (R, 1, r) where a row meets its own expert's ranks."""
        if ranks not in self._masks:
            mask_R1r = torch.zeros(self.rows, 1, sum(ranks), dtype=like.dtype, device=like.device)
            if not self._bare:
                mask_R1r[: self.creative, :, : ranks[0]] = 1
                mask_R1r[self.creative :, :, ranks[0] :] = 1
            self._masks[ranks] = mask_R1r
        return self._masks[ranks]


class PairedLinear(nn.Module):
    """A base linear and both experts' updates. Factors are (A (rank, i), B (o, rank) times the scale), or None."""

    def __init__(self, base: nn.Linear, factors: tuple[tuple[Tensor, Tensor] | None, ...], split: Split) -> None:
        super().__init__()
        self.base, self.split = base, split
        a_ri = [pair[0] for pair in factors if pair is not None]
        b_ro = [pair[1].T for pair in factors if pair is not None]
        kind, device = base.weight.dtype, base.weight.device
        self.a_ri = torch.cat(a_ri).to(device, kind).contiguous()
        self.b_ro = torch.cat(b_ro).to(device, kind).contiguous()
        self.ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in factors)

    def forward(self, x_RTi: Tensor) -> Tensor:
        rows, tokens, _ = x_RTi.shape
        low_RTr = nn.functional.linear(x_RTi, self.a_ri) * self.split.mask(self.ranks, x_RTi)
        out_RTo = self.base(x_RTi)
        return torch.addmm(out_RTo.flatten(0, 1), low_RTr.flatten(0, 1), self.b_ro).view(rows, tokens, -1)


def pair_adapters(model: Any, creative: Path, factual: Path) -> Split:
    """Put both adapters into the base model, in place; returns what tells it whose rows come next.

    Raises:
        ModelError: an adapter uses something other than plain LoRA on linears.
    """
    split = Split()
    factors = [read_adapter(folder) for folder in (creative, factual)]
    for name in sorted({*factors[0], *factors[1]}):
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise ModelError(f"adapts {name}, which is no linear of its base", where=str(creative))
        parent, _, leaf = name.rpartition(".")
        paired = PairedLinear(linear, tuple(one.get(name) for one in factors), split)
        setattr(model.get_submodule(parent), leaf, paired)
    return split


def read_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B (times alpha / r) of every adapted linear, by its name in the base."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    for option in _UNSUPPORTED:
        if config.get(option):
            raise ModelError(
                f"uses {option}", where=str(folder), fix="serve it merged: `tiger export` writes a full model"
            )
    if config.get("bias", "none") != "none" or config.get("peft_type", "LORA") != "LORA":
        raise ModelError("is not a plain LoRA adapter", where=str(folder), fix="train it with peft's LoRA, bias: none")
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    factors = {}
    for key, a_ri in tensors.items():
        name, found, _ = key.removeprefix(_PREFIX).partition(".lora_A.")
        if found:
            b_or = tensors[key.replace(".lora_A.", ".lora_B.")]
            factors[name] = (a_ri.float(), b_or.float() * scale)
    return factors

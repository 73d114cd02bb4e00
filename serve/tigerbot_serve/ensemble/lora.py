"""Two LoRA experts on one base, stepped as one batch.

Every adapted linear runs its base matrix once over all rows; each row then gets its own expert's low-rank update. Both
experts' factors are stacked, and a mask over the rank zeroes the other expert's part, so any split of the rows costs
the same small products and no gather. Linears that read the same input share the first of these products, which can
also be rows of the base matrix. Merging the adapters instead would make two full models.

Legend: R rows, T tokens, N = R T, i and o a linear's input and output width, r ranks of both experts together, over
all linears that are run as one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tigerbot.errors import ModelError

Factors = tuple[Tensor, Tensor]  # A (rank, i) and B (o, rank), the latter times alpha / rank

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
        """Ones (R, 1, r) where a row meets its own expert's ranks, which alternate: creative, factual, creative, ..."""
        if ranks not in self._masks:
            mask_R1r = torch.zeros(self.rows, 1, sum(ranks), dtype=like.dtype, device=like.device)
            for side, part_R1k in enumerate(mask_R1r.split(ranks, dim=2)):
                part_R1k[self.creative :] = 0 if self._bare else side % 2
                part_R1k[: self.creative] = 0 if self._bare else 1 - side % 2
            self._masks[ranks] = mask_R1r
        return self._masks[ranks]


class PairedLinear(nn.Module):
    """A base linear and both experts' updates of it.

    Args:
        base: one linear, or several of one input whose outputs stand side by side.
        widths: of each of their outputs.
        factors: of each of them, the creative expert's and the factual one's; None where it is not adapted.
        a_ri: A of both experts, of all of them; None where `base` gives its product with the input behind its outputs.
    """

    def __init__(
        self,
        base: Callable[[Tensor], Tensor],
        widths: Sequence[int],
        factors: Sequence[tuple[Factors | None, Factors | None]],
        split: Split,
        a_ri: Tensor | None,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.base, self.split = base, split
        self._a_ri, self._width = a_ri, sum(widths)
        self._ranks = tuple(0 if pair is None else len(pair[0]) for pairs in factors for pair in pairs)
        self._updates: list[tuple[slice, slice, Tensor]] = []  # outputs, ranks, B of both experts
        column = rank = 0
        for width, pairs in zip(widths, factors, strict=True):
            b_ko = [pair[1].T for pair in pairs if pair is not None]
            if b_ko:
                both_ko = torch.cat(b_ko).to(like.device, like.dtype).contiguous()
                ranks = slice(rank, rank + len(both_ko))
                self._updates.append((slice(column, column + width), ranks, both_ko))
                rank = ranks.stop
            column += width

    def forward(self, x: Tensor) -> Tensor:
        x_Ni = x.flatten(0, -2)
        out_No = self.base(x_Ni)
        low_Nr = out_No[:, self._width :] if self._a_ri is None else nn.functional.linear(x_Ni, self._a_ri)
        low_Nr.view(self.split.rows, -1, low_Nr.shape[-1]).mul_(self.split.mask(self._ranks, x))
        for columns, ranks, b_ko in self._updates:
            out_No[:, columns].addmm_(low_Nr[:, ranks], b_ko)
        return out_No[:, : self._width].view(*x.shape[:-1], -1)


class Adapters:
    """Both experts' adapters of one base.

    Raises:
        ModelError: an adapter uses something other than plain LoRA on linears.
    """

    def __init__(self, creative: Path, factual: Path) -> None:
        self.split = Split()
        self._folder = creative
        self._factors = [read_adapter(folder) for folder in (creative, factual)]
        self.names = sorted({*self._factors[0], *self._factors[1]})

    @property
    def first_layer(self) -> int:
        """The first layer that either expert adapts: below it both are the base."""
        found = [re.search(r"(?:^|\.)layers\.(\d+)\.", name) for name in self.names]
        return min((int(one[1]) for one in found if one), default=0)

    def of(self, name: str) -> tuple[Factors | None, Factors | None]:
        return self._factors[0].get(name), self._factors[1].get(name)

    def down(self, names: Iterable[str]) -> Tensor | None:
        """A (r, i) of both experts, of all linears of these names, which read one input; None where none is adapted."""
        found = [pair[0] for name in names for pair in self.of(name) if pair is not None]
        return torch.cat(found) if found else None

    def paired(
        self, base: Callable[[Tensor], Tensor], linears: dict[str, nn.Linear], *, folded: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """`base`, which runs these linears side by side, with the experts' updates of them.

        `folded`: it has the rows of `down` below theirs, so that both are one product.
        """
        a_ri = self.down(linears)
        if a_ri is None:
            return base
        like = next(iter(linears.values())).weight
        widths, factors = [linear.out_features for linear in linears.values()], [self.of(name) for name in linears]
        apart_ri = None if folded else a_ri.to(like.device, like.dtype)
        return PairedLinear(base, widths, factors, self.split, apart_ri, like)

    def check(self, model: nn.Module) -> None:
        """Refuse adapters of something that the base has not."""
        for name in self.names:
            try:
                found = model.get_submodule(name)
            except AttributeError:
                found = None
            if not isinstance(found, nn.Linear):
                raise ModelError(f"adapts {name}, which is no linear of its base", where=str(self._folder))


def read_adapter(folder: Path) -> dict[str, Factors]:
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
        elif ".lora_B." not in key:
            raise ModelError(f"adapts more than linears: {key}", where=str(folder), fix="train it on linears only")
    return factors

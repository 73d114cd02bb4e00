"""Keys and values of every row, preallocated, handed to a transformers model as its cache.

Rows grow from a middle outwards, the creative side to the left and the factual side to the right, so that the rows of
one step, all creative then all factual, are one contiguous view: attention reads them in place, with no gather. A row
that ends is filled by the outermost row of its side. A model that stands alone uses one side. This module knows
nothing about sequences or why there are two sides.

Legend: R rows of a step, T new tokens a row, H key-value heads, L cached positions, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class KVCache(Cache):
    """Keys and values of `left + right` rows of up to `max_length` positions.

    `begin` says which rows the next forward feeds; the model then calls `update` once a layer.
    """

    def __init__(self, config: Any, left: int, right: int, max_length: int, dtype: torch.dtype, device: str) -> None:
        super().__init__(layers=[])
        self.middle = left
        self.dtype, self.device = dtype, device
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (left + right, heads, max_length, width)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self._arange = torch.arange(max_length, device=device)

    def begin(
        self, left: int, right: int, starts: Sequence[int], new: int, rows: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Feed `left` and `right` rows, row i from position `starts[i]` on, `new` tokens each.

        `rows` names them where they are not the ones next to the middle; scattered ones are gathered. A row that has
        fewer than `new` tokens is filled up: what that writes lies behind its end and is written again before it is
        seen.

        Returns:
            Positions (R, T) and the additive mask (R or 1, 1, T, L).
        """
        self._low, self._high = self.middle - left, self.middle + right
        self._picked: Tensor | None = None
        if rows is not None:
            self._low, self._high = rows[0], rows[0] + len(rows)
            if list(rows) != list(range(self._low, self._high)):
                self._picked = torch.tensor(rows, device=self.device)
        self._new, self._length = new, max(starts) + new
        self._start = starts[0] if len(set(starts)) == 1 else None
        self._rows_R1 = self._arange[: len(starts), None] if self._picked is None else self._picked[:, None]
        if self._start is not None:
            positions_RT = self._arange[None, self._start : self._start + new]
        else:
            positions_RT = torch.tensor(starts, device=self.device)[:, None] + self._arange[:new]
        self._positions_RT = positions_RT
        seen_RTL = self._arange[: self._length] <= positions_RT[:, :, None]
        mask_R1TL = torch.zeros(seen_RTL.shape, dtype=self.dtype, device=self.device)
        mask_R1TL.masked_fill_(~seen_RTL, torch.finfo(self.dtype).min)
        return positions_RT.expand(len(starts), new), mask_R1TL[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._picked is not None:
            keys, values = self.keys[layer_idx], self.values[layer_idx]
            keys[self._rows_R1, :, self._positions_RT] = key_states.transpose(1, 2)
            values[self._rows_R1, :, self._positions_RT] = value_states.transpose(1, 2)
            return keys[self._picked, :, : self._length], values[self._picked, :, : self._length]
        keys_RHLD = self.keys[layer_idx][self._low : self._high]
        values_RHLD = self.values[layer_idx][self._low : self._high]
        if self._start is not None:
            keys_RHLD[:, :, self._start : self._length] = key_states
            values_RHLD[:, :, self._start : self._length] = value_states
        else:
            keys_RHLD[self._rows_R1, :, self._positions_RT] = key_states.transpose(1, 2)
            values_RHLD[self._rows_R1, :, self._positions_RT] = value_states.transpose(1, 2)
        return keys_RHLD[:, :, : self._length], values_RHLD[:, :, : self._length]

    def row(self, side: int, index: int) -> int:
        """The row that is `index` places out from the middle on a side (0 left, 1 right)."""
        return self.middle + index if side else self.middle - 1 - index

    def copy_row(self, source: KVCache, from_row: int, to_row: int, length: int) -> None:
        """Take the first `length` positions of a row of `source` (which may be this cache)."""
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            for layer, other in zip(mine, theirs, strict=True):
                layer[to_row, :, :length] = other[from_row, :, :length]

    def read(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of some positions of a row: keys and values (2, layers, H, T, D)."""
        both = (self.keys, self.values)
        return torch.stack([torch.stack([layer[row, :, start:stop] for layer in layers]) for layers in both])

    def write(self, row: int, block_2NHTD: Tensor) -> None:
        """Make the first positions of a row what `read` gave."""
        for layers, new_NHTD in zip((self.keys, self.values), block_2NHTD, strict=True):
            for layer, new_HTD in zip(layers, new_NHTD, strict=True):
                layer[row, :, : new_HTD.shape[1]] = new_HTD

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length - self._new

"""Keys and values of every row, preallocated, handed to a transformers model as its cache.

Rows grow from a middle outwards, the creative side to the left and the factual side to the right, so that the rows of
one step, all creative then all factual, are one contiguous view: attention reads them in place, with no gather. A row
that ends is filled by the outermost row of its side. A model that stands alone uses one side. This module knows
nothing about sequences or why there are two sides.

Keys and values of a layer lie side by side, so that a step writes both at once, and all layers lie in one tensor, so
that a row is moved by one copy.

Legend: N layers, R rows, T new tokens a row, H key-value heads, L cached positions, D head width; 2 is keys, values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class KVCache(Cache):
    """Keys and values of `left + right` rows of up to `max_length` positions.

    `begin` says which rows the next forward feeds; the model then writes every layer's new keys and values by `put`,
    or, a transformers model, by `update`.

    Attributes:
        keys, values: of every layer, (rows, H, max_length, D).
        runs: the rows of the step, as stretches [low, high) of neighbours.
        length: positions that its attention reads.
        even: all its rows have the same length.
    """

    def __init__(self, config: Any, left: int, right: int, max_length: int, dtype: torch.dtype, device: str) -> None:
        super().__init__(layers=[])
        self.middle = left
        self.dtype, self.device = dtype, device
        heads = config.num_key_value_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, left + right, 2, heads, max_length, width)
        self._all_NR2HLD = torch.zeros(shape, dtype=dtype, device=device)
        self._both = self._all_NR2HLD.unbind(0)
        self.keys, self.values = ([layer[:, which] for layer in self._both] for which in (0, 1))
        self._arange = torch.arange(max_length, device=device)

    def begin(
        self, left: int, right: int, starts: Sequence[int], new: int, rows: Sequence[int] | None = None
    ) -> Tensor:
        """Feed `left` and `right` rows, row i from position `starts[i]` on, `new` tokens each; gives positions (R, T).

        `rows` names them where they are not the ones next to the middle. A row that has fewer than `new` tokens is
        filled up: what that writes lies behind its end and is written again before it is seen.
        """
        self.runs = ((self.middle - left, self.middle + right),) if rows is None else runs_of(rows)
        self._new, self.length = new, max(starts) + new
        self._start = starts[0]
        self.even = len(set(starts)) == 1
        if not self.even or len(self.runs) > 1:
            order = [row for low, high in self.runs for row in range(low, high)]
            self._rows_R1 = torch.tensor(order, device=self.device)[:, None]
        if self.even:
            self.positions_RT = self._arange[None, self._start : self._start + new].expand(len(starts), new)
        else:
            starts_R1 = torch.tensor(starts, device=self.device)[:, None]
            self.positions_RT = starts_R1 + self._arange[None, :new]
        return self.positions_RT

    def mask(self) -> Tensor:
        """What each new token may read, additive (R or 1, 1, T, L). Even rows of one token read everything."""
        positions_RT = self.positions_RT[:1] if self.even else self.positions_RT
        unseen_RTL = self._arange[: self.length] > positions_RT[:, :, None]
        mask_RTL = torch.zeros(unseen_RTL.shape, dtype=self.dtype, device=self.device)
        return mask_RTL.masked_fill_(unseen_RTL, torch.finfo(self.dtype).min)[:, None]

    def put(self, layer_idx: int, new_RT2HD: Tensor) -> None:
        """Write the step's keys and values of a layer."""
        both = self._both[layer_idx]
        if self.even and len(self.runs) == 1:
            low, high = self.runs[0]
            both[low:high, :, :, self._start : self.length] = new_RT2HD.permute(0, 2, 3, 1, 4)
        else:
            both[self._rows_R1, :, :, self.positions_RT] = new_RT2HD

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.put(layer_idx, torch.stack((key_states, value_states), dim=1).permute(0, 3, 1, 2, 4))
        rows = slice(*self.runs[0]) if len(self.runs) == 1 else self._rows_R1[:, 0]
        return self.keys[layer_idx][rows, :, : self.length], self.values[layer_idx][rows, :, : self.length]

    def row(self, side: int, index: int) -> int:
        """The row that is `index` places out from the middle on a side (0 left, 1 right)."""
        return self.middle + index if side else self.middle - 1 - index

    def copy_row(self, source: KVCache, from_row: int, to_row: int, length: int) -> None:
        """Take the first `length` positions of a row of `source` (which may be this cache)."""
        self._all_NR2HLD[:, to_row, :, :, :length] = source._all_NR2HLD[:, from_row, :, :, :length]

    def read(self, row: int, start: int, stop: int) -> Tensor:
        """A copy of some positions of a row: (layers, 2, H, T, D)."""
        return self._all_NR2HLD[:, row, :, :, start:stop].clone()

    def write(self, row: int, block_N2HTD: Tensor) -> None:
        """Make the first positions of a row what `read` gave."""
        self._all_NR2HLD[:, row, :, :, : block_N2HTD.shape[3]] = block_N2HTD

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length - self._new


def runs_of(rows: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Stretches [low, high) of neighbouring rows, in the order given."""
    found: list[tuple[int, int]] = []
    for row in rows:
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return tuple(found)

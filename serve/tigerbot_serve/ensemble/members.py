"""The models of an ensemble behind one face: feed rows of each side, get each side's hidden states.

Two LoRA experts of one base share its weights and step as one batch, and share a row where neither is adapted; two full
models step one after the other; one model alone takes every row, whatever the dial. This module knows nothing about the
dial, the heads or sampling.

Legend: R rows, T new tokens a row, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tigerbot.errors import ModelError
from tigerbot_serve.engine.kv_cache import KVCache
from tigerbot_serve.ensemble.decoder import LlamaDecoder
from tigerbot_serve.ensemble.matrix import Matrix
from tigerbot_serve.ensemble.stock import StockDecoder
from tigerbot_serve.ensemble.twins import TwinFinder

CREATIVE, FACTUAL = 0, 1


@dataclass(frozen=True)
class Feed:
    """Rows of one side: new token ids (R, T) and the position each row's first one has.

    `rows` says which, counted from the middle; None are the first ones, in the order of the view (see `forward`).
    `texts` says which text a row belongs to: rows of both sides of one text, which take the same tokens at the same
    positions, are one below the experts' adapters and run once there. Without it only the same feed on both sides is
    known to be that.
    """

    ids: Sequence[Sequence[int]]
    starts: Sequence[int]
    texts: Sequence[int] = ()
    rows: Sequence[int] | None = None


NOTHING = Feed((), ())


@dataclass(frozen=True)
class Stack:
    """One decoder, the sides whose rows it takes, and each of these sides' output matrix."""

    decoder: LlamaDecoder | StockDecoder
    sides: tuple[int, ...]
    outputs: tuple[Matrix, ...]


class Caches:
    """The key-value caches of all stacks, addressed by side."""

    def __init__(self, stacks: Sequence[Stack], rows: int, max_length: int) -> None:
        self.of_stack = [
            KVCache(
                stack.decoder.config,
                rows if CREATIVE in stack.sides else 0,
                rows if FACTUAL in stack.sides else 0,
                max_length,
                stack.decoder.dtype,
                stack.decoder.device,
            )
            for stack in stacks
        ]
        self._of_side = {side: self.of_stack[i] for i, stack in enumerate(stacks) for side in stack.sides}

    def copy(self, source: Caches, side: int, from_index: int, to_index: int, length: int) -> None:
        """Take row `from_index` of a side of `source` as this one's `to_index`."""
        mine, theirs = self._of_side[side], source._of_side[side]
        mine.copy_row(theirs, theirs.row(side, from_index), mine.row(side, to_index), length)

    def read(self, side: int, index: int, start: int, stop: int) -> Tensor:
        """A copy of some positions of a row; see `KVCache.read`."""
        mine = self._of_side[side]
        return mine.read(mine.row(side, index), start, stop)

    def write(self, side: int, index: int, block: Tensor) -> None:
        """Make a row's first positions what `read` gave."""
        mine = self._of_side[side]
        mine.write(mine.row(side, index), block)


class Members:
    """One or two models with one vocabulary.

    Attributes:
        hashes: creative_hash, factual_hash, tokenizer_hash, and `quantisation`, none or int8.
        alone: there is one model and no dial.
        shares_output: both sides have one output matrix.
        one_batch: both sides' rows are one batch of one base.
    """

    def __init__(self, stacks: Sequence[Stack], tokenizer: Any, hashes: dict[str, str]) -> None:
        self.stacks, self.tokenizer, self.hashes = tuple(stacks), tokenizer, hashes
        self.alone = sum(len(stack.sides) for stack in stacks) == 1
        self.one_batch = not self.alone and len(stacks) == 1
        self._outputs = {
            side: output for stack in stacks for side, output in zip(stack.sides, stack.outputs, strict=True)
        }
        self._devices = {side: stack.decoder.device for stack in stacks for side in stack.sides}
        self.shares_output = len(self._outputs) == 2 and self._outputs[CREATIVE] is self._outputs[FACTUAL]
        configs = [stack.decoder.config for stack in stacks]
        self.width: int = configs[0].hidden_size
        self.vocab_size: int = configs[0].vocab_size
        self.max_positions: int = min(config.max_position_embeddings for config in configs)
        self.device = stacks[0].decoder.device
        self._twins = TwinFinder(self.device)
        for config in configs[1:]:
            if config.vocab_size != self.vocab_size:
                raise ModelError(
                    f"members have {self.vocab_size} and {config.vocab_size} outputs",
                    where="members",
                    fix="serve members of one vocabulary",
                )

    def sides(self, dial: float) -> tuple[int, ...]:
        """Whose rows a sequence needs: at the ends of the dial only one member runs."""
        if self.alone or dial >= 1:
            return (CREATIVE,)
        return (FACTUAL,) if dial <= 0 else (CREATIVE, FACTUAL)

    def caches(self, rows: int, max_length: int) -> Caches:
        """Room for `rows` rows of each side."""
        return Caches(self.stacks, rows, max_length)

    def forward(self, caches: Caches, feeds: tuple[Feed, Feed]) -> tuple[Tensor | None, Tensor | None]:
        """Feed both sides' rows; gives their final normed hidden states (R, T, d), None for a side with no rows.

        Row i of a side is the one `len(rows) - 1 - i` out from the middle for creative rows, i for factual ones.
        """
        hidden: list[Tensor | None] = [None, None]
        for stack, cache in zip(self.stacks, caches.of_stack, strict=True):
            mine = [feeds[side] if side in stack.sides else NOTHING for side in (CREATIVE, FACTUAL)]
            counts = [len(feed.starts) for feed in mine]
            if not sum(counts):
                continue
            out_RTd = self._forward(stack, cache, mine, counts)
            for side, part_RTd in enumerate(out_RTd.split(counts)):
                if counts[side]:
                    hidden[side] = part_RTd.to(self.device)
        return hidden[0], hidden[1]

    def logits(self, side: int, hidden_Rd: Tensor) -> Tensor:
        """Unnormalised natural log-probabilities (R, V), float32."""
        return self._outputs[side](hidden_Rd.to(self._devices[side])).float().to(self.device)

    def read_base(self, caches: Caches, feed: Feed) -> Tensor:
        """Final normed hidden states (R, T, d) of the experts' base without its adapters.

        Where there is no common base, the factual model's, or the only one's.
        """
        stack = self.stacks[-1]
        side = stack.sides[-1]
        with stack.decoder.split.bare() if stack.decoder.split else nullcontext():
            hidden_RTd = self.forward(caches, (NOTHING, feed) if side == FACTUAL else (feed, NOTHING))[side]
        assert hidden_RTd is not None
        return hidden_RTd

    def log_probabilities(self, side: int, hidden_Rd: Tensor) -> Tensor:
        """Natural log-probabilities (R, V), float32."""
        return torch.log_softmax(self.logits(side, hidden_Rd), dim=-1)

    def log_probabilities_of_both(self, side: int, own_Rd: Tensor, other_Rd: Tensor) -> tuple[Tensor, Tensor]:
        """A side's log-probabilities and the other side's: one product where they have one output matrix."""
        if not self.shares_output:
            return self.log_probabilities(side, own_Rd), self.log_probabilities(1 - side, other_Rd)
        own_RV, other_RV = self.log_probabilities(side, torch.cat([own_Rd, other_Rd])).split(len(own_Rd))
        return own_RV, other_RV

    def _forward(self, stack: Stack, cache: KVCache, feeds: Sequence[Feed], counts: Sequence[int]) -> Tensor:
        ids_RT = torch.tensor([*feeds[CREATIVE].ids, *feeds[FACTUAL].ids], device=stack.decoder.device)
        starts, rows = [*feeds[CREATIVE].starts, *feeds[FACTUAL].starts], _rows(cache, feeds)
        cache.begin(counts[CREATIVE], counts[FACTUAL], starts, ids_RT.shape[1], rows)
        twins = None
        if stack.decoder.shares_layers and all(counts) and rows is None:
            same = range(counts[CREATIVE]) if feeds[CREATIVE] is feeds[FACTUAL] else ()
            twins = self._twins.find(feeds[CREATIVE].texts or same, feeds[FACTUAL].texts or same)
        return stack.decoder.forward(cache, ids_RT, counts, twins)


def _rows(cache: KVCache, feeds: Sequence[Feed]) -> list[int] | None:
    """The cache rows of feeds that name theirs."""
    if all(feed.rows is None for feed in feeds):
        return None
    rows: list[int] = []
    for side, feed in enumerate(feeds):
        first = range(len(feed.starts))
        rows += [cache.row(side, index) for index in (feed.rows or (first if side else first[::-1]))]
    return rows

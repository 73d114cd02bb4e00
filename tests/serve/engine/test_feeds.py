"""Rows that are picked, scattered, of different lengths or filled up give the states that they give alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL, NOTHING, Feed


def some(chance: random.Random, size: int) -> list[int]:
    return [chance.randrange(80, 400) for _ in range(size)]


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("side", [CREATIVE, FACTUAL])
@pytest.mark.parametrize("rows", [[0, 1], [2, 0], [1]])
@torch.inference_mode()
def test_picked_rows_give_what_they_give_alone(kind, side, rows, engine_of) -> None:
    members = engine_of(kind, start=False).members
    chance = random.Random(1)
    texts, more = [some(chance, size) for size in (9, 12, 7)], [some(chance, size) for size in (4, 2, 3)]

    def on(feed: Feed) -> tuple[Feed, Feed]:
        return (feed, NOTHING) if side == CREATIVE else (NOTHING, feed)

    def state(hidden: tuple[Tensor | None, Tensor | None]) -> Tensor:
        found = hidden[side]
        assert found is not None
        return found

    caches, scratch = members.caches(3, 64), members.caches(1, 64)
    alone = []
    for row, (text, new) in enumerate(zip(texts, more, strict=True)):
        members.forward(scratch, on(Feed([text], [0])))
        caches.copy(scratch, side, 0, row, len(text))
        alone.append(state(members.forward(scratch, on(Feed([new], [len(text)])))))

    single = state(
        members.forward(caches, on(Feed([more[r][:1] for r in rows], [len(texts[r]) for r in rows], rows=rows)))
    )
    filled = [[*more[r], *[0] * (4 - len(more[r]))] for r in rows]
    chunk = state(members.forward(caches, on(Feed(filled, [len(texts[r]) for r in rows], rows=rows))))

    for place, row in enumerate(rows):
        assert torch.allclose(single[place, 0], alone[row][0, 0], atol=1e-5)
        assert torch.allclose(chunk[place, : len(more[row])], alone[row][0], atol=1e-5)

"""The outer optimizer, the quantiser and the layout, without a network."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tigerbot_jobs.train.islands import outer
from tigerbot_jobs.train.islands.layout import (
    Layout,
    Piece,
    covers,
    restore_pieces,
    scales_of,
)
from tigerbot_jobs.train.islands.quantise import BLOCK, Codes, quantise, restore, with_feedback

VALUES = arrays.arrays(np.float32, st.integers(0, 3 * BLOCK + 5), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def test_the_outer_step_is_torch_sgd_with_nesterov_momentum() -> None:
    rng = np.random.default_rng(1)
    ours = rng.standard_normal(1000).astype(np.float32)
    momentum = np.zeros_like(ours)
    theirs = torch.nn.Parameter(torch.from_numpy(ours.copy()))
    stock = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)

    for _ in range(20):
        deltas = [rng.standard_normal(1000).astype(np.float32) for _ in range(3)]
        ours += outer.change(outer.mean(deltas), momentum, lr=0.7, mu=0.9)
        theirs.grad = torch.from_numpy(np.mean(deltas, axis=0, dtype=np.float64)).float()
        stock.step()

    assert np.allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_one_island_without_momentum_at_rate_one_arrives_at_its_own_weights() -> None:
    rng = np.random.default_rng(1)
    start, local = (rng.standard_normal(1000).astype(np.float32) for _ in range(2))

    arrived = start + outer.change(outer.mean([start - local]), np.zeros_like(start), lr=1.0, mu=0.0)

    assert np.allclose(arrived, local, atol=1e-6)


@settings(deadline=None)
@given(VALUES)
def test_a_quantised_value_is_within_half_a_code_of_itself(values: np.ndarray) -> None:
    codes = quantise(values)

    error = np.abs(restore(codes).astype(np.float64) - values)

    assert codes.codes.dtype == np.int8 and len(codes.codes) == len(values)
    assert (error <= np.repeat(codes.scales, BLOCK)[: len(values)] * 0.501 + np.finfo(np.float32).tiny * 127).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 2 * BLOCK), st.integers(0, 2**31))
def test_with_feedback_nothing_is_lost_over_the_rounds(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    carried, sent, wanted = np.zeros(size, np.float32), np.zeros(size), np.zeros(size)

    for _ in range(10):
        delta = rng.standard_normal(size).astype(np.float32)
        codes, carried = with_feedback(delta, carried)
        sent, wanted = sent + restore(codes), wanted + delta

    assert np.allclose(sent + carried, wanted, atol=1e-4)
    assert np.abs(carried).max() < 0.05


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_delta_that_is_not_finite_is_still_not_finite_after_the_wire(bad: float) -> None:
    values = np.ones(3 * BLOCK, np.float32)
    values[BLOCK + 3] = bad

    found = restore(quantise(values))

    assert not np.isfinite(found).all()
    assert (found[:BLOCK] == 1).all() and (found[2 * BLOCK :] == 1).all()


@st.composite
def cut_models(draw: st.DrawFn) -> tuple[dict[str, int], list[Piece]]:
    """A model and all its pieces, cut anywhere."""
    sizes = draw(st.dictionaries(st.text("abc.", min_size=1, max_size=5), st.integers(1, 900), min_size=1, max_size=5))
    pieces = []
    for name, size in sizes.items():
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        pieces += [Piece(name, begin, end - begin) for begin, end in itertools.pairwise(cuts)]
    return sizes, draw(st.permutations(pieces))


@settings(deadline=None)
@given(cut_models(), st.integers(0, 2**31))
def test_pieces_cut_anywhere_carry_every_value_to_its_place(model: tuple[dict[str, int], list[Piece]], seed: int):
    sizes, pieces = model
    layout = Layout(sizes)
    whole = np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)
    codes = quantise(whole)

    scattered = np.zeros_like(whole)
    layout.scatter(scattered, pieces, layout.gather(whole, pieces))
    packed = layout.gather_codes(codes, pieces)

    assert all((scattered[layout.of(name)] == whole[layout.of(name)]).all() for name in sizes)
    assert (restore_pieces(packed, pieces) == layout.gather(restore(codes), pieces)).all()
    assert len(packed.scales) == scales_of(pieces)
    assert covers(sizes, pieces)
    assert not covers(sizes, pieces[1:]) and not covers(sizes, [*pieces, pieces[0]])


def test_a_piece_outside_the_model_is_refused() -> None:
    layout = Layout({"a": 10})

    for piece in (Piece("b", 0, 1), Piece("a", -1, 2), Piece("a", 5, 6), Piece("a", 0, 0)):
        with pytest.raises(ValueError, match="not a part of this model"):
            layout.place(piece)


def test_restoring_from_the_middle_of_a_block_uses_that_blocks_scale() -> None:
    codes = Codes(np.array([1, 1, 1], np.int8), np.array([2.0, 3.0], np.float32))

    assert restore(codes, BLOCK - 2).tolist() == [2.0, 2.0, 3.0]

"""A state cut for some ranks and put together for others is the same state, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refused_keys import REFUSED, Refused
from torch import Tensor
from worlds import (
    Case,
    Worlds,
    begin,
    bytes_digest,
    compare_with_deepspeed,
    digest,
    ends_at,
    full_state,
    go_on,
    go_on_in_fp16,
    norms_in_fp16,
    refused,
    roll_back,
    state_of,
)

from tigerbot.errors import StateError
from tigerbot_jobs.train.reshard import Copy, check_shards, plan
from tigerbot_jobs.train.shard import ShardMeta, Slice

# The pure part: layouts as DeepSpeed makes them, and worse.


def cut(shapes: list[tuple[int, ...]], groups: list[int], stage: int, world_size: int, align: int) -> list[list[Slice]]:
    """The slices of every rank: stage 0 whole parameters, 1 and 2 a flat group in equal parts, 3 every parameter so."""
    ranks: list[list[Slice]] = [[] for _ in range(world_size)]
    placed: dict[int, int] = {}
    whole = dict.fromkeys(groups, 0)
    for shape, group in zip(shapes, groups, strict=True):
        whole[group] += torch.Size(shape).numel()
    for index, (shape, group) in enumerate(zip(shapes, groups, strict=True)):
        numel, name = torch.Size(shape).numel(), f"p{index}"
        if stage == 3:
            piece = -(-numel // world_size)
            for rank in range(world_size):
                start = rank * piece
                if start < numel:
                    ranks[rank].append(
                        Slice(name, shape, start, min(piece, numel - start), group, placed.get(group, 0))
                    )
            placed[group] = placed.get(group, 0) + piece
        elif stage == 0:
            for held in ranks:
                held.append(Slice(name, shape, 0, numel, index, 0))
        else:
            part = -(-whole[group] // (align * world_size)) * align
            begin = placed.get(group, 0)
            for rank in range(world_size):
                first, last = max(begin, rank * part), min(begin + numel, (rank + 1) * part)
                if first < last:
                    ranks[rank].append(Slice(name, shape, first - begin, last - first, group, first - rank * part))
            placed[group] = begin + numel
    return ranks


def filled(layout: list[list[Slice]], full: dict[str, Tensor]) -> list[dict[int, Tensor]]:
    """Every rank's flat tensors, NaN where nothing belongs."""
    ranks = []
    for held in layout:
        sizes: dict[int, int] = {}
        for piece in held:
            sizes[piece.group] = max(sizes.get(piece.group, 0), piece.offset + piece.numel)
        flats = {group: torch.full((size + 3,), torch.nan) for group, size in sizes.items()}
        for piece in held:
            value = full[piece.name][piece.start : piece.start + piece.numel]
            flats[piece.group][piece.offset : piece.offset + piece.numel] = value
        ranks.append(flats)
    return ranks


def moved(copies: list[Copy], source: list[dict[int, Tensor]], target: dict[int, Tensor]) -> None:
    for copy in copies:
        wanted = target[copy.group][copy.offset : copy.offset + copy.numel]
        assert wanted.isnan().all() and len(wanted) == copy.numel  # nothing is written twice
        wanted.copy_(source[copy.shard][copy.source_group][copy.source_offset : copy.source_offset + copy.numel])


SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6)
LAYOUT = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5))


@settings(deadline=None, max_examples=300)
@given(SHAPES, st.data(), st.lists(LAYOUT, min_size=2, max_size=5))
def test_any_chain_of_worlds_and_stages_gives_back_every_element(shapes, data, chain) -> None:
    groups = data.draw(st.lists(st.integers(0, 1), min_size=len(shapes), max_size=len(shapes)))
    full = {f"p{i}": torch.rand(torch.Size(shape).numel()) for i, shape in enumerate(shapes)}
    layouts = [cut(shapes, groups, *where) for where in chain]
    held = filled(layouts[0], full)

    for before, after in pairwise(layouts):
        fresh = filled(after, {name: torch.full_like(value, torch.nan) for name, value in full.items()})
        for rank, flats in enumerate(fresh):
            moved(plan(after[rank], before, prefer=rank), held, flats)
        held = fresh

    for rank, flats in enumerate(filled(layouts[-1], full)):
        for group, flat in flats.items():
            assert torch.equal(held[rank][group].nan_to_num(-1), flat.nan_to_num(-1))


@settings(deadline=None)
@given(SHAPES, st.integers(0, 3), st.integers(1, 4), st.integers(1, 5))
def test_the_same_world_takes_whole_flat_tensors_from_its_own_shard(shapes, stage, world_size, align) -> None:
    layout = cut(shapes, [0] * len(shapes), stage, world_size, align)

    for rank, held in enumerate(layout):
        copies = plan(held, layout, prefer=rank)

        assert {copy.shard for copy in copies} <= {rank}
        assert all((copy.source_group, copy.source_offset) == (copy.group, copy.offset) for copy in copies)
        if stage in (1, 2):
            assert len(copies) <= 1


@settings(deadline=None)
@given(SHAPES, st.integers(1, 3), st.integers(2, 4), st.data())
def test_a_lost_shard_is_named_by_its_first_missing_parameter(shapes, stage, world_size, data) -> None:
    layout = cut(shapes, [0] * len(shapes), stage, world_size, 1)
    lost = data.draw(st.sampled_from([rank for rank in range(world_size) if layout[rank]]))
    have = [held for rank, held in enumerate(layout) if rank != lost]

    with pytest.raises(StateError, match=r"p\d: element \d+ is in no shard"):
        plan(cut(shapes, [0] * len(shapes), 0, 1, 1)[0], have)


def test_two_shards_that_overlap_or_another_shape_are_refused() -> None:
    whole = [Slice("w", (4, 2), 0, 8, 0, 0)]

    with pytest.raises(StateError, match="w: element 3 is held twice"):
        plan(whole, [[Slice("w", (4, 2), 0, 4, 0, 0)], [Slice("w", (4, 2), 3, 5, 0, 0)]])
    with pytest.raises(StateError, match=r"w: has shape \[2, 4\], the model's has \[4, 2\]"):
        plan(whole, [[Slice("w", (2, 4), 0, 8, 0, 0)]])


def test_shards_of_different_steps_or_of_another_model_are_refused() -> None:
    shard = ShardMeta(3, 0, 2, 2, 0, (Slice("w", (8,), 0, 4, 0, 0),))

    with pytest.raises(StateError, match=r"the shards are of steps \[3, 4\]"):
        check_shards([shard, replace(shard, rank=1, step=4)], ["w"])
    with pytest.raises(StateError, match=r"it holds w .* which does not train in this model"):
        check_shards([shard], ["v"])


# Real engines.


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    made = Worlds(4, tmp_path_factory.mktemp("worlds"))
    yield made
    made.close()


SOAK = pytest.mark.soak  # every combination takes minutes; one of each kind runs always
KINDS = [(130, "tied"), pytest.param(65, "plain", marks=SOAK), pytest.param(65, "lora", marks=SOAK)]


@pytest.mark.parametrize(("hidden", "kind"), KINDS)
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_the_same_world_goes_on_bit_for_bit(worlds: Worlds, stage: int, bf16: bool, hidden: int, kind: str) -> None:
    case = Case(stage, hidden, bf16, kind)
    cut_at_2 = worlds.run(2, begin, case, 2)

    resumed = worlds.run(2, go_on, case, state_of(cut_at_2), 2)

    undisturbed = worlds.run(2, begin, case, 4)
    assert bytes_digest(state_of(resumed, 0)) == bytes_digest(state_of(cut_at_2))
    assert resumed[0][1] == undisturbed[0][0][2:]
    assert bytes_digest(state_of(resumed)) == bytes_digest(state_of(undisturbed))


CHAINS = [
    [(2, 2), (2, 1), (2, 2)],
    [(2, 1), (2, 3)],
    [(3, 2), (3, 4), (3, 1)],
    [(2, 2), (3, 3)],
    [(3, 3), (1, 2)],
    [(0, 2), (2, 3), (0, 1)],
    [(1, 4), (0, 2), (3, 2)],
]


@pytest.mark.parametrize(("hidden", "kind"), KINDS)
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=SOAK)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(f"zero{s}x{w}" for s, w in chain))
def test_another_world_or_stage_loses_nothing_and_trains_on_the_same(
    worlds: Worlds, chain: list[tuple[int, int]], bf16: bool, hidden: int, kind: str
) -> None:
    (stage, world_size), *later = chain
    found = worlds.run(world_size, begin, Case(stage, hidden, bf16, kind), 2)
    undisturbed = worlds.run(world_size, begin, Case(stage, hidden, bf16, kind), 2 + 2 * len(later))[0][0]
    losses = found[0][0]

    for stage, world_size in later:
        before = state_of(found)
        found = worlds.run(world_size, go_on, Case(stage, hidden, bf16, kind), before, 2)
        restored, after, _ = found[0]
        losses = losses + after

        assert digest(state_of(found, 0)) == digest(before)
        assert restored.meta.step == before[0].meta.step

    assert losses == pytest.approx(undisturbed, rel=1e-3 if bf16 else 1e-5)


@pytest.mark.parametrize("stage", range(4))
def test_a_state_put_back_into_a_living_engine_gives_the_same_steps_again(worlds: Worlds, stage: int) -> None:
    first, again = worlds.run(2, roll_back, Case(stage, bf16=True), 3)[0]

    assert first == again


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "tied", "lora"])
def test_deepspeeds_own_map_of_names_says_the_same(worlds: Worlds, stage: int, kind: str) -> None:
    for theirs, ours in worlds.run(3, compare_with_deepspeed, Case(stage, kind=kind)):
        mapped = [{s.name: (s.offset, s.numel) for s in ours if s.group == group} for group in range(len(theirs))]

        assert mapped == theirs


def test_tied_weights_are_there_once_and_frozen_ones_not_at_all(worlds: Worlds) -> None:
    tied = full_state(state_of(worlds.run(2, begin, Case(2, kind="tied"), 1)))
    lora = full_state(state_of(worlds.run(2, begin, Case(3, kind="lora"), 1)))

    assert "embed.weight.master" in tied and "head.weight.master" not in tied
    assert {name.rsplit(".", 1)[0] for name in lora} == {"lora_a.weight", "lora_b.weight", "lora_b.bias"}


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=SOAK), pytest.param(2, marks=SOAK), 3])
def test_the_loss_scale_of_fp16_goes_on_where_it_was(worlds: Worlds, stage: int) -> None:
    cut_at_4 = worlds.run(2, go_on_in_fp16, stage, [], 4)

    resumed = worlds.run(2, go_on_in_fp16, stage, state_of(cut_at_4), 3)

    undisturbed = worlds.run(2, go_on_in_fp16, stage, [], 7)
    assert resumed[0][0] == undisturbed[0][0][4:]
    assert len({2.0**24, *cut_at_4[0][0], *resumed[0][0]}) > 2  # it moved, before and after
    assert bytes_digest(state_of(resumed)) == bytes_digest(state_of(undisturbed))
    assert resumed[0][1].meta.extra == undisturbed[0][1].meta.extra


def test_the_loss_scale_goes_over_to_another_stage_and_world(worlds: Worlds) -> None:
    (scales, *_), *_ = before = worlds.run(2, go_on_in_fp16, 3, [], 3)

    for stage in (2, 0):
        _, after = worlds.run(1, go_on_in_fp16, stage, state_of(before), 0)[0]

        assert after.meta.extra["loss_scale"]["cur_scale"] == scales[-1] < 2.0**24
        assert after.meta.extra["skipped_steps"] == before[0][1].meta.extra["skipped_steps"] > 0


def test_a_step_that_fp16_leaves_out_to_find_its_scale_is_no_fault(worlds: Worlds) -> None:
    norms, made = zip(*worlds.run(1, norms_in_fp16, 2)[0], strict=True)

    assert not made[0] and made[-1]
    assert norms[0] == 0.0 and 0.1 < norms[-1] < 100


ENDS = [
    pytest.param(case, id=case.name, marks=() if case.name in ("half masters", "mixed at 1") else SOAK)
    for case in REFUSED
    if case.ends
]


@pytest.mark.parametrize("case", ENDS)
def test_what_the_driver_refuses_a_real_engine_would_end_at(worlds: Worlds, case: Refused) -> None:
    assert worlds.run(1, ends_at, case.keys)[0]


def test_a_layout_that_is_not_known_is_refused_in_one_line(worlds: Worlds) -> None:
    message = worlds.run(1, refused, Case(1, bf16=True), {"data_types": {"grad_accum_dtype": "fp32"}})[0]

    assert message.startswith("deepspeed: ZeRO 1 with these keys is a BF16_Optimizer, whose state cannot be kept;")

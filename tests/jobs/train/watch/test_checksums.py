"""Silent corruption: one wrong bit among replicas, and a step that is not the same twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tigerbot_jobs.train.watch.checksums import _weighted_digest, odd_ranks, replay_matches, replica_digest, vote

DIGESTS = [replica_digest, _weighted_digest]  # the CPU's, and the one other devices use


def weights(dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape).to(dtype) for shape in ((33, 7), (5,), (16, 16), (1,))]


@pytest.mark.parametrize("digest", DIGESTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_give_the_same_digest_and_a_flipped_one_another(digest, dtype: torch.dtype) -> None:
    here, there = weights(dtype), weights(dtype)
    same = int(digest(here)) == int(digest(there))

    there[2].view(torch.int16).view(-1)[77] ^= 1

    assert same and int(digest(here)) != int(digest(there))


@pytest.mark.parametrize("digest", DIGESTS)
def test_order_shape_and_sign_of_zero_count(digest) -> None:
    one, other = torch.arange(4.0), torch.zeros(4)

    digests = [
        int(digest(tensors))
        for tensors in ([one, other], [other, one], [one, -other], [one.flip(0), other], [one, torch.zeros(5)])
    ]

    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("digest", DIGESTS)
def test_nans_and_slices_of_other_memory_are_digested_by_their_bits(digest) -> None:
    base = torch.full((9,), torch.nan, dtype=torch.bfloat16)

    assert int(digest([base[1:6]])) == int(digest([base[2:7].clone()]))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_flipped_bit_and_any_exchange_is_found_on_a_device_too(data: st.DataObject) -> None:
    words = torch.tensor(
        data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=50)), dtype=torch.int32
    )
    before = int(_weighted_digest([words]))
    flipped, swapped = words.clone(), words.clone()
    place, other = data.draw(st.permutations(range(len(words))))[:2]

    flipped[place] ^= 1 << data.draw(st.integers(0, 30))
    swapped[[place, other]] = words[[other, place]]

    assert int(_weighted_digest([flipped])) != before
    assert (int(_weighted_digest([swapped])) != before) == bool(words[place] != words[other])


def test_more_than_one_chunk_is_digested_whole() -> None:
    many = torch.zeros(2_500_000, dtype=torch.int64)
    before = int(_weighted_digest([many]))

    many[2_499_999] = 1

    assert int(_weighted_digest([many])) != before


@pytest.mark.gpu
def test_a_gpu_digests_as_the_same_formula_on_the_cpu() -> None:
    tensors = weights(torch.bfloat16)

    assert int(replica_digest([tensor.cuda() for tensor in tensors])) == int(_weighted_digest(tensors))


def test_the_minority_is_named_and_a_tie_names_nobody() -> None:
    assert odd_ranks([7, 7, 9, 7]) == [2]
    assert odd_ranks(torch.tensor([7, 7, 7])) == []
    assert odd_ranks([7, 9]) == [] and not vote([7, 9]).agree
    assert odd_ranks([7, 7, 9, 8]) == []
    assert vote([7, 7, 9, 7, 8]).evidence == "rank 2, 4 of 5 holds other bits than the 3 that agree"


class Machine:
    """A state that a step doubles; the runs in `faulty` come out wrong."""

    def __init__(self, faulty: set[int] = frozenset(), noisy: bool = False) -> None:
        self.state, self.runs, self.faulty, self.noisy = 3, 0, faulty, noisy

    def restore(self) -> None:
        self.state = 3

    def run(self) -> int:
        self.runs += 1
        self.state = self.state * 2 + (self.runs in self.faulty) + (self.runs if self.noisy else 0)
        return self.state


def test_a_step_that_gives_the_same_bits_twice_is_sound_and_leaves_the_state_as_it_was() -> None:
    machine = Machine()

    report = replay_matches(machine.run, machine.restore)

    assert report.matches and machine.state == 3 and machine.runs == 2


@pytest.mark.parametrize("faulty", [1, 2])
def test_one_odd_run_of_three_is_a_transient_fault(faulty: int) -> None:
    machine = Machine({faulty})

    report = replay_matches(machine.run, machine.restore)

    assert not report.matches and report.deterministic
    assert f"run {faulty} of 3" in report.evidence and machine.state == 3


def test_what_is_never_the_same_twice_accuses_no_machine() -> None:
    machine = Machine(noisy=True)

    report = replay_matches(machine.run, machine.restore)

    assert not report.matches and not report.deterministic and "not deterministic" in report.evidence

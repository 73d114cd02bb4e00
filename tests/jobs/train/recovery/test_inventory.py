"""Which state a generation begins from."""

from __future__ import annotations

from dataclasses import replace

from tigerbot_jobs.train.recovery.inventory import Restored, Stored, choose, newest_whole, valid
from tigerbot_jobs.train.recovery.messages import ShardAt


def shard(
    step: int, rank: int, *, generation: int = 1, world_size: int = 2, stage: int = 2, node: str = "n"
) -> ShardAt:
    return ShardAt("/dev/shm/x", 0, 10, node, "n:1", step, generation, rank, world_size, stage)


def test_the_newest_step_that_every_rank_has_is_taken() -> None:
    found = newest_whole([shard(7, 0), shard(7, 1), shard(8, 0), shard(6, 0), shard(6, 1)], [])

    assert [(one.step, one.rank) for one in found] == [(7, 0), (7, 1)]


def test_a_copy_on_a_peer_stands_in_for_a_shard_that_went_with_its_node() -> None:
    found = newest_whole([shard(7, 0), replace(shard(7, 1), node="peer")], [])

    assert [one.node for one in found] == ["n", "peer"]


def test_one_shard_is_the_whole_state_where_all_ranks_hold_the_same() -> None:
    found = newest_whole([shard(7, 1, stage=0)], [])

    assert len(found) == 1 and found[0].rank == 1


def test_what_a_rollback_has_undone_is_not_taken() -> None:
    history = [Restored(1, 0), Restored(2, 5)]

    assert not valid(1, 6, history) and valid(1, 5, history) and valid(2, 6, history)
    found = newest_whole([shard(9, 0), shard(9, 1), shard(6, 0, generation=2), shard(6, 1, generation=2)], history)
    assert [(one.step, one.generation) for one in found] == [(6, 2), (6, 2)]


def test_no_later_step_than_asked_for_is_taken() -> None:
    found = newest_whole([shard(9, 0), shard(9, 1), shard(4, 0), shard(4, 1)], [], at_most=5)

    assert found[0].step == 4


def test_shards_of_different_generations_are_no_state() -> None:
    assert newest_whole([shard(7, 0), shard(7, 1, generation=2)], []) == []


def test_memory_is_taken_unless_storage_is_further() -> None:
    shards = [shard(7, 0), shard(7, 1)]

    assert choose(shards, Stored(6, "step-6")).tier == "memory"
    assert choose(shards, Stored(8, "step-8")).key == "step-8"
    assert choose([], Stored(-1, "")).tier == "none"

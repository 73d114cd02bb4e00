"""Which state a generation begins from: the newest one that is whole and that no rollback has undone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tigerbot_jobs.train.recovery.messages import Form, ShardAt


@dataclass(frozen=True)
class Stored:
    """The newest checkpoint in storage; step -1: there is none."""

    step: int
    key: str


@dataclass(frozen=True)
class Restored:
    """A generation that began at a step: what older generations did after it is undone."""

    generation: int
    step: int


def newest_whole(
    shards: Iterable[ShardAt], history: Sequence[Restored], *, at_most: int | None = None
) -> list[ShardAt]:
    """One shard of every rank of the newest whole snapshot, by rank; nothing when there is none.

    Args:
        shards: everything the keepers hold, copies on peers included.
        history: the generations so far.
        at_most: take no later step than this one.
    """
    sets: dict[tuple[int, int], dict[int, ShardAt]] = defaultdict(dict)
    for shard in shards:
        if valid(shard.generation, shard.step, history) and (at_most is None or shard.step <= at_most):
            sets[(shard.step, shard.generation)].setdefault(shard.rank, shard)
    for key in sorted(sets, reverse=True):
        found = sets[key]
        one = next(iter(found.values()))
        if one.zero_stage == 0:  # every rank holds the whole state
            return [one]
        if len(found) == one.world_size:
            return [found[rank] for rank in range(one.world_size)]
    return []


def choose(shards: list[ShardAt], stored: Stored) -> Form:
    """Where to begin: from memory, if nothing newer is in storage; else from there; else from nothing.

    Who forms the generation fills in its number, the rank and the world size.
    """
    if shards and shards[0].step >= stored.step:
        return Form(0, 0, 0, "memory", shards[0].step, shards)
    if stored.key:
        return Form(0, 0, 0, "storage", stored.step, key=stored.key)
    return Form(0, 0, 0, "none", 0)


def valid(generation: int, step: int, history: Sequence[Restored]) -> bool:
    """Whether a snapshot is part of the run's history: no later generation began before its step."""
    return all(later.generation <= generation or step <= later.step for later in history)

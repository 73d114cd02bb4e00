"""A state that was cut for some ranks, put together for others: intersections of intervals, and nothing else.

`plan` is pure; `assemble` puts a state into a live engine of any world size and ZeRO stage. Where the bytes come from
(a mapping, a peer, a bucket) is the caller's `read`. No element is computed, so none changes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from tigerbot.errors import StateError
from tigerbot_jobs.train.shard import ShardMeta, Slice

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[int, str, int, int], "Tensor"]  # (shard, tensor's name, begin, end) -> its elements [begin, end)


@dataclass(frozen=True)
class Copy:
    """`numel` elements of a shard's flat tensor `source_group` from `source_offset`, to our `group` from `offset`."""

    shard: int
    source_group: int
    source_offset: int
    group: int
    offset: int
    numel: int


@dataclass(frozen=True)
class _Source:
    start: int
    end: int
    held: tuple[tuple[int, Slice], ...]  # (shard, its piece): several where a state is replicated


def plan(wanted: Sequence[Slice], have: Sequence[Sequence[Slice]], *, prefer: int = 0) -> list[Copy]:
    """What to copy so that every wanted element is written exactly once.

    Args:
        wanted: of this rank.
        have: of every shard there is.
        prefer: the shard to take where several hold the same.

    Raises:
        StateError: an element of a parameter is nowhere, or in two places that do not agree.
    """
    sources = _by_name(wanted, have)
    copies: list[Copy] = []
    for piece in sorted(wanted, key=attrgetter("group", "offset")):
        copies.extend(_cut(piece, sources[piece.name], prefer))
    return _joined(copies)


def shards_read(wanted: Sequence[Slice], shards: Sequence[ShardMeta], *, prefer: int) -> set[int]:
    """The shards that `assemble` reads from."""
    return {copy.shard for copy in plan(wanted, [shard.slices for shard in shards], prefer=prefer)} or {0}


def assemble(engine: Any, shards: Sequence[ShardMeta], read: Read) -> None:
    """Collective. Put a state into an engine, and set its counters; the learning rate is left alone.

    Raises:
        StateError: the shards are not one whole state of this model.
    """
    import torch.distributed as dist

    from tigerbot_jobs.train import zero_state

    check_shards(shards, zero_state.parameter_names(engine))
    copies = plan(zero_state.slices(engine), [shard.slices for shard in shards], prefer=dist.get_rank())
    state = zero_state.writable_state(engine)
    for copy in copies:
        for part in zero_state.PARTS:
            begin, end = copy.source_offset, copy.source_offset + copy.numel
            found = read(copy.shard, f"{copy.source_group}.{part}", begin, end)
            state[f"{copy.group}.{part}"][copy.offset : copy.offset + copy.numel].copy_(found)
    for group, steps in _adam_steps(copies, len(state) // (len(zero_state.PARTS) + 1), read).items():
        state[f"{group}.step"].fill_(steps)
    zero_state.settle(engine, step=shards[0].step, counted=shards[0].extra)


def check_shards(shards: Sequence[ShardMeta], names: Iterable[str]) -> None:
    """Raises: StateError: the shards are of different steps, or of a model with other parameters."""
    if not shards:
        raise StateError("there is no shard", where="state", fix="begin anew with --replace")
    steps = sorted({shard.step for shard in shards})
    if len(steps) > 1:
        raise StateError(f"the shards are of steps {steps}", where="state", fix="use an older checkpoint")
    unknown = sorted({piece.name for shard in shards for piece in shard.slices} - set(names))
    if unknown:
        raise StateError(
            f"it holds {unknown[0]} ({len(unknown)} such), which does not train in this model",
            where="state",
            fix="resume the model it was made with, or --replace to begin anew",
        )


def _by_name(wanted: Sequence[Slice], have: Sequence[Sequence[Slice]]) -> dict[str, list[_Source]]:
    """The sources of every wanted parameter in order, replicas as one."""
    names = {piece.name: piece.shape for piece in wanted}
    holders: dict[str, dict[tuple[int, int], list[tuple[int, Slice]]]] = defaultdict(lambda: defaultdict(list))
    for shard, pieces in enumerate(have):
        for piece in pieces:
            if piece.name not in names:
                continue
            if tuple(piece.shape) != tuple(names[piece.name]):
                raise StateError(
                    f"has shape {list(piece.shape)}, the model's has {list(names[piece.name])}",
                    where=piece.name,
                    fix="resume the model it was made with",
                )
            holders[piece.name][piece.start, piece.start + piece.numel].append((shard, piece))
    found: dict[str, list[_Source]] = {name: [] for name in names}
    for name, intervals in holders.items():
        covered = 0
        for (start, end), held in sorted(intervals.items()):
            shards = [shard for shard, _ in held]
            if start < covered or len(set(shards)) < len(shards):
                raise StateError(f"element {start} is held twice", where=name, fix="use an older checkpoint")
            covered = end
            found[name].append(_Source(start, end, tuple(held)))
    return found


def _cut(piece: Slice, sources: list[_Source], prefer: int) -> list[Copy]:
    """The copies that fill one wanted piece."""
    copies, at, last = [], piece.start, piece.start + piece.numel
    first = max(0, bisect_right(sources, at, key=attrgetter("start")) - 1)
    for source in sources[first:]:
        if at >= last or source.start > at:
            break
        if source.end <= at:
            continue
        numel = min(source.end, last) - at
        shard, place = next((h for h in source.held if h[0] == prefer), source.held[prefer % len(source.held)])
        origin, target = place.offset + at - place.start, piece.offset + at - piece.start
        copies.append(Copy(shard, place.group, origin, piece.group, target, numel))
        at += numel
    if at < last:
        raise StateError(
            f"element {at} is in no shard", where=piece.name, fix="find the missing shard, or use an older checkpoint"
        )
    return copies


def _joined(copies: list[Copy]) -> list[Copy]:
    """Neighbours on both sides as one copy: at the same world size there is then one for each flat tensor."""
    found: list[Copy] = []
    for copy in copies:
        last = found[-1] if found else None
        if last is not None and _follows(last, copy):
            found[-1] = replace(last, numel=last.numel + copy.numel)
        else:
            found.append(copy)
    return found


def _follows(last: Copy, copy: Copy) -> bool:
    return (last.shard, last.source_group, last.group) == (copy.shard, copy.source_group, copy.group) and (
        last.source_offset + last.numel,
        last.offset + last.numel,
    ) == (copy.source_offset, copy.offset)


def _adam_steps(copies: list[Copy], groups: int, read: Read) -> dict[int, float]:
    """The step count of each of our flat tensors. One that a gradient never reached counts fewer: the highest stands."""
    sources = {(copy.shard, copy.source_group) for copy in copies} or {(0, 0)}
    steps = {source: float(read(source[0], f"{source[1]}.step", 0, 1)) for source in sorted(sources)}
    found = dict.fromkeys(range(groups), 0.0)
    for copy in copies:
        found[copy.group] = max(found[copy.group], steps[copy.shard, copy.source_group])
    # A flat tensor of padding alone copies nothing.
    filled = {copy.group for copy in copies}
    return {group: found[group] if group in filled else max(steps.values()) for group in found}

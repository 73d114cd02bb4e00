"""Where every rank stands at one moment, and who of them the others wait for."""

from __future__ import annotations

from dataclasses import dataclass

from tigerbot_jobs.train.watch.beats import LOCAL


@dataclass(frozen=True)
class Standing:
    """A member at the moment of a check."""

    worker: str
    rank: int
    node: str
    generation: int
    step: int
    phase: str
    entered_at: float
    heard_at: float
    turned_at: float
    busy: bool
    steps: int
    silence_s: float  # without a beat for so long it counts as silent


def who_is_behind(group: list[Standing]) -> list[Standing]:
    """Who the others wait for, if they wait: least far; all of them where nobody is further than another.

    By generation and step; then whoever is at work of its own while others stand in a collective; then, among those in
    collectives, whoever has been in its own the longest: the others could pass into theirs only after it had come.
    """
    where = min((one.generation, one.step) for one in group)
    first = [one for one in group if (one.generation, one.step) == where]
    if len(first) < len(group):
        return first
    local = [one for one in group if one.phase in LOCAL]
    if local:
        return local
    oldest = min(group, key=lambda one: one.entered_at).phase
    return [one for one in group if one.phase == oldest]


def places(group: list[Standing]) -> str:
    """`ranks 0, 2 in backward of step 7`, for every place somebody is at; long lists are cut."""
    found: dict[tuple[str, int], list[int]] = {}
    for one in group:
        found.setdefault((one.phase, one.step), []).append(one.rank)
    return ", ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks[:8]))}"
        f"{f' and {len(ranks) - 8} more' if len(ranks) > 8 else ''} in {phase} of step {step}"
        for (phase, step), ranks in found.items()
    )

"""Who holds everybody up: hung ranks, frozen processes, lost nodes, told from ranks that are only slow.

Heartbeats come from outside the collectives, so that a rank inside one can still be seen. Nobody is accused on one
sign alone: a silent or late rank must also be one that the others stand still for, and a rank that still uses the CPU
gets three times as long, though never for ever. Knows nothing about processes or networks: beats and time go in,
findings come out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tigerbot_jobs.train.watch.beats import LOCAL, Beat, Heard
from tigerbot_jobs.train.watch.phase_times import TURN, PhaseTimes
from tigerbot_jobs.train.watch.standing import Standing, places, who_is_behind

SLOW = 3.0  # times the deadline for who still shows life
WARM_STEPS = 5  # of a worker's life: compile, first touches
_NO_STEP = ("form", "restore", "idle")  # a step number that changes here is a restored one
_STILL_S = 1.0  # others count as waiting when they have not moved for this long
_AGAIN_S = 60.0
_TOGETHER_S = 1.5  # within this, two fell silent at once

Kind = Literal["frozen", "node", "unheard", "partition", "stuck", "collective", "shared"]


@dataclass(frozen=True)
class Hang:
    """Something that does not move.

    Args:
        kind: frozen (the process), node (lost, or its network), unheard (its beats are lost, training goes on),
            partition (all nodes at once: our own network), stuck (this rank never arrived), collective (all wait for
            one another), shared (all are in the same work of their own: storage, say).
        worker, rank, node: the culprit, or None where none can be named.
        times: how often this was reported by now; above 1, what was done about it did not help.
    """

    kind: Kind
    worker: str | None
    rank: int | None
    node: str | None
    generation: int
    step: int
    phase: str
    waited_s: float
    deadline_s: float
    evidence: str
    times: int = 1


class HangWatch:
    """Beats in, hangs out.

    Args:
        floor_s: the least learned deadline of a phase, by phase, where the usual one does not fit.
        silence_s: without a beat for so long, and three times the widest gap between its last beats, a worker counts as
            silent; the gap counts for no more than the p99 of a step.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        floor_s: Mapping[str, float] | None = None,
        silence_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._times, self._silence_s, self._clock = PhaseTimes(floor_s), silence_s, clock
        self._heard: dict[str, Heard] = {}
        self._keepers: dict[str, float] = {}
        self._generation, self._members = -1, ()
        self._formed_at = self._awake_at = self._resumed_at = clock()
        self._reported: dict[tuple[str, str | None, int], tuple[float, int]] = {}

    @property
    def times(self) -> PhaseTimes:
        """What was learned of the phases."""
        return self._times

    def new_generation(self, generation: int, members: Sequence[str]) -> None:
        """These workers, by rank, are the group from now on."""
        self._generation, self._members, self._formed_at = generation, tuple(members), self._now()
        self._reported.clear()

    def forget(self, worker: str) -> None:
        """A worker is gone and is not waited for."""
        self._heard.pop(worker, None)
        self._members = tuple(member for member in self._members if member != worker)

    def keeper_heard(self, node: str) -> None:
        """A sign of life from a node that is not a worker's."""
        self._keepers[node] = self._now()

    def keeper_gone(self, node: str) -> None:
        """A node that is known to have left."""
        self._keepers.pop(node, None)

    def beat(self, beat: Beat) -> None:
        """Take a worker's heartbeat."""
        now, known = self._now(), self._heard.get(beat.worker)
        if known is None:
            entered_at = max(self._resumed_at, now - beat.in_phase_s)
            known = Heard(beat, now, entered_at=entered_at, turned_at=entered_at)
            self._heard[beat.worker] = known
        elif beat.generation < known.beat.generation:
            known.heard_at = now  # late by a network's whim: it lives, and says nothing new
            return
        elif _place(beat) != _place(known.beat):
            self._learn(known, beat, now)
        known.note_cpu(now, beat.cpu_s)
        known.gaps.append(now - known.heard_at)
        known.beat, known.heard_at = beat, now

    def check(self) -> list[Hang]:
        """What hangs now; each hang once, and again for every further minute (or two deadlines) that it lasts."""
        now = self._now()
        group = [self._standing(rank, worker, now) for rank, worker in enumerate(self._members)]
        found = self._silent(group, now) or self._late(group, now) or self._turning(group, now) if group else []
        return [due for hang in found if (due := self._due(hang, now))]

    def _due(self, hang: Hang, now: float) -> Hang | None:
        key = (hang.kind, hang.worker, hang.step)
        reported_at, times = self._reported.get(key, (-math.inf, 0))
        if now - reported_at <= max(_AGAIN_S, 2 * hang.deadline_s):
            return None
        self._reported[key] = (now, times + 1)
        return replace(hang, times=times + 1)

    def _learn(self, known: Heard, beat: Beat, now: float) -> None:
        """A phase ended somewhere between two beats: at the latest when the new one began."""
        before, same_group = known.beat, beat.generation == known.beat.generation
        entered_at = max(self._resumed_at, now - beat.in_phase_s)
        if same_group and known.steps >= WARM_STEPS:
            took = max(before.in_phase_s, entered_at - known.entered_at)
            self._times.add(before.phase, before.step, took)
        if beat.step != before.step:
            passed = beat.step - before.step  # several short ones may lie between two beats
            if same_group and passed > 0 and before.phase not in _NO_STEP:
                if known.steps >= WARM_STEPS:
                    self._times.add(TURN, before.step, (now - known.turned_at) / passed)
                known.steps += passed
            known.turned_at = now
        known.entered_at = entered_at
        known.cpu.clear()

    def _now(self) -> float:
        """The time; when this process stood still (a sleeping laptop, a stopped driver) it heard nobody: no one's fault."""
        now = self._clock()
        paused, self._awake_at = now - self._awake_at, now
        if paused > self._silence_s / 2:
            self._resumed_at = now
            for known in self._heard.values():
                known.heard_at = min(now, known.heard_at + paused)
                known.entered_at = min(now, known.entered_at + paused)
                known.turned_at = min(now, known.turned_at + paused)
                known.cpu.clear()
            self._keepers = {node: min(now, at + paused) for node, at in self._keepers.items()}
            self._formed_at = min(now, self._formed_at + paused)
        return now

    def _standing(self, rank: int, worker: str, now: float) -> Standing:
        """Where a member is. One that has not come into this generation yet counts as forming it."""
        known = self._heard.get(worker)
        if known is None:
            return Standing(
                worker, rank, "", -1, -1, "form", self._formed_at, self._formed_at, now, False, 0, self._silence_s
            )
        beat = known.beat
        late = beat.generation < self._generation
        entered_at = max(known.entered_at, self._formed_at) if late else known.entered_at
        return Standing(
            worker,
            rank,
            beat.node,
            beat.generation,
            beat.step,
            "form" if late else beat.phase,
            entered_at,
            max(known.heard_at, self._formed_at) if late else known.heard_at,
            max(known.turned_at, self._formed_at),
            known.busy(),
            known.steps,
            self._silence_s + min(SLOW * known.widest_gap(), SLOW * self._times.p99(TURN)),
        )

    def _silent(self, group: list[Standing], now: float) -> list[Hang]:
        quiet = [one for one in group if now - one.heard_at > one.silence_s]
        if len(quiet) == len(group) > 1 and self._all_nodes_silent(group, now):
            waited = min(now - one.heard_at for one in quiet)
            text = f"nothing heard for {waited:.1f} s from any of {len(group)} ranks on any node: our own network"
            return [self._hang("partition", None, group[0], waited, self._silence_s, text)]
        return [hang for one in quiet if (hang := self._silence_of(one, group, now))]

    def _silence_of(self, one: Standing, group: list[Standing], now: float) -> Hang | None:
        silent_s, others = now - one.heard_at, self._signs_of(one.node, besides=one.worker)
        alone = len(group) == 1 and not others
        second_sign = self._stand_still(group, now) and not alone
        if not second_sign and silent_s <= SLOW * one.silence_s:
            return None
        said = f"rank {one.rank} ({one.worker}) has not beaten for {silent_s:.1f} s, last seen in {one.phase} of step {one.step}"
        since = [other for other in group if other is not one and other.turned_at > one.heard_at + 2 * _STILL_S]
        if since:
            text = f"{said}; rank {since[0].rank} has finished steps since, so its beats are lost and not its work"
            return self._hang("unheard", one, one, silent_s, SLOW * one.silence_s, text)
        if others and all(now - at > silent_s - _TOGETHER_S for at in others):
            text = f"{said}; so are all {len(others)} others of node {one.node}: the node is lost, or its network"
            return self._hang("node", one, one, silent_s, one.silence_s, text)
        alive = "others of its node still beat" if others else "nothing else of its node is known"
        text = f"{said}; no step was finished since and {alive}: the process is frozen"
        return self._hang("frozen", one, one, silent_s, one.silence_s, text)

    def _stand_still(self, group: list[Standing], now: float) -> bool:
        """No member that can be heard has changed its phase lately."""
        return all(now - one.entered_at > _STILL_S for one in group if now - one.heard_at <= one.silence_s)

    def _signs_of(self, node: str, besides: str) -> list[float]:
        """When the other workers and the keeper of a node were last heard."""
        workers = [known.heard_at for name, known in self._heard.items() if known.beat.node == node and name != besides]
        return workers + ([self._keepers[node]] if node in self._keepers else [])

    def _all_nodes_silent(self, group: list[Standing], now: float) -> bool:
        nodes = {one.node for one in group}
        signs = [at for node in nodes for at in self._signs_of(node, besides="")]
        return len(nodes) > 1 and all(now - at > self._silence_s - _TOGETHER_S for at in signs)

    def _late(self, group: list[Standing], now: float) -> list[Hang]:
        warm = all(one.steps >= WARM_STEPS for one in group)
        late = [one for one in group if now - one.entered_at > self._allowed(one, warm)]
        behind = who_is_behind(group)
        if len(behind) == len(group) == 1 and late:
            return [self._stuck(behind[0], group, now, warm)]
        if 2 * len(behind) <= len(group):
            waiting = all(now - one.entered_at > _STILL_S for one in group if one not in behind)
            return [self._stuck(one, group, now, warm) for one in behind if one in late and waiting]
        return [self._together(behind, group, now, warm)] if all(one in late for one in behind) else []

    def _allowed(self, one: Standing, warm: bool) -> float:
        return self._times.deadline_s(one.phase, warm=warm) * (SLOW if one.busy else 1.0)

    def _stuck(self, one: Standing, group: list[Standing], now: float, warm: bool) -> Hang:
        waited, limit = now - one.entered_at, self._allowed(one, warm)
        busy = f"though it used the CPU, {SLOW:g} times its time is over" if one.busy else "it uses no CPU"
        others = places([other for other in group if other is not one])
        text = (
            f"rank {one.rank} ({one.worker}) is in {one.phase} of step {one.step} for {waited:.1f} s"
            f" (deadline {limit:.1f} s) and {busy}"
        ) + (f"; waiting: {others}" if others else "")
        return self._hang("stuck", one, one, waited, limit, text)

    def _together(self, behind: list[Standing], group: list[Standing], now: float, warm: bool) -> Hang:
        one = behind[0]
        waited = min(now - other.entered_at for other in behind)
        shared = all(other.phase == one.phase for other in group) and one.phase in LOCAL - {"forward"}
        why = "the storage or network they share" if shared else "the network, or ranks in different collectives"
        text = f"no rank can be named, all stand still for {waited:.1f} s: {places(group)}: {why}"
        return self._hang("shared" if shared else "collective", None, one, waited, self._allowed(one, warm), text)

    def _turning(self, group: list[Standing], now: float) -> list[Hang]:
        """Phases change and no step is ever finished: life is no excuse for ever."""
        warm = all(one.steps >= WARM_STEPS for one in group)
        limit = SLOW * max(self._times.deadline_s(phase, warm=warm) for phase in {TURN, *(one.phase for one in group)})
        waited = min(now - one.turned_at for one in group)
        if waited <= limit:
            return []
        behind = who_is_behind(group)
        culprit = behind[0] if len(behind) == 1 else None
        text = f"no rank has finished a step for {waited:.0f} s (limit {limit:.0f} s), though phases change: {places(group)}"
        return [self._hang("stuck" if culprit else "collective", culprit, behind[0], waited, limit, text)]

    def _hang(
        self, kind: Kind, culprit: Standing | None, at: Standing, waited_s: float, deadline_s: float, evidence: str
    ) -> Hang:
        return Hang(
            kind,
            culprit.worker if culprit else None,
            culprit.rank if culprit else None,
            culprit.node if culprit else None,
            self._generation,
            at.step,
            at.phase,
            waited_s,
            deadline_s,
            evidence,
        )


def _place(beat: Beat) -> tuple[int, int, str]:
    """The phase belongs to it: a beat may fall between the change of a phase and that of its number."""
    return beat.generation, beat.seq, beat.phase

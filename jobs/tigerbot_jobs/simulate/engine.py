"""The discrete-event engine: thousands of replicas of one job, each at its own time, advanced together.

A replica is always in one phase (running, detecting, replacing, ...) and has a clock for everything that can happen
next. One turn of the loop takes every replica to its own next event and handles the replicas by the kind of it, so the
cost of Python is shared by all of them. **An event is one state transition of one replica**: a failure, the end of
a phase (start, detection, replacement, restore, resize, planned pause), a node that comes back or is warm, a planned
interruption, a straggler that appears or is noticed, the end of the horizon. Snapshots are not events: between two
events they are a closed form (`progress`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tigerbot_jobs.simulate.draws import CORRUPTION, HANG, ISLAND, NODE, PROCESS, Draws
from tigerbot_jobs.simulate.fleet import Fleet
from tigerbot_jobs.simulate.mixes import KINDS
from tigerbot_jobs.simulate.progress import Progress
from tigerbot_jobs.simulate.setting import Setting

# What a replica's next event can be: a clock each.
PHASE_ENDS, FAILURE, NODE_BACK, PLANNED, STRAGGLER, HORIZON = range(6)
# What a replica is in.
RUN, START, DETECT, REPLACE, WAIT, RESTORE, RESIZE, PAUSE = range(8)
CATEGORIES = ("start", "restore", "checkpoint_block", "hang_wait", "resize", "idle_after_failure", "other")
_CATEGORY_OF = {START: 0, RESTORE: 1, DETECT: 3, RESIZE: 4, REPLACE: 5, WAIT: 5, PAUSE: 6}
_CATEGORY = np.array([_CATEGORY_OF.get(phase, 2) for phase in range(8)])
_AGAIN_S = 3600.0


@dataclass(frozen=True)
class Raw:
    """What R replicas went through. Seconds by ledger category, each an array of length R."""

    seconds: dict[str, np.ndarray]
    work_s: np.ndarray
    failures: np.ndarray
    by_kind: np.ndarray
    waits: np.ndarray
    events: int


class Engine:
    """R replicas of a setting from time 0 to its horizon."""

    def __init__(self, setting: Setting, replicas: int, seed: int) -> None:
        self.setting, self.replicas = setting, replicas
        self.draws = Draws(setting, seed)
        self.progress = Progress(setting.tiers, replicas)
        self.fleet = Fleet(replicas, setting.nodes, setting.standbys, setting.spares - setting.standbys)
        policy = setting.policy
        self.detect_s = np.zeros(len(KINDS))
        self.detect_s[[PROCESS, HANG, NODE, ISLAND, CORRUPTION]] = (
            policy.detect_process_s,
            policy.detect_hang_s,
            policy.detect_node_s,
            policy.detect_island_s,
            policy.detect_corruption_s,
        )
        self.survives = np.array([setting.tiers.memory and kind in policy.memory_survives for kind in KINDS])
        every = np.arange(replicas)
        self.now = np.zeros(replicas)
        self.phase = np.full(replicas, START)
        self.from_memory = np.zeros(replicas, dtype=bool)  # which tier the recovery under way restores from
        self.recovering = np.zeros(replicas, dtype=bool)
        self.lost = np.zeros(replicas)  # nodes lost since training last ran
        self.slow = np.zeros(replicas, dtype=bool)
        self.spent_s = np.zeros((len(CATEGORIES), replicas))
        self.by_kind = np.zeros(len(KINDS), dtype=np.int64)
        self.failures = np.zeros(replicas, dtype=np.int64)
        self.waits = np.zeros(replicas, dtype=np.int64)
        self.clock = np.full((6, replicas), np.inf)
        self.clock[PHASE_ENDS] = setting.start_s
        self.clock[PLANNED] = self.draws.every_s("planned", setting.planned_every_s, replicas)
        self.clock[STRAGGLER] = self.draws.every_s("straggler", setting.straggler_every_s, replicas)
        self.clock[HORIZON] = setting.horizon_s
        self._expose(every)

    def run(self) -> Raw:
        """Simulate to the horizon."""
        handlers = (
            self._phase_ends,
            self._failure,
            self._node_back,
            self._planned,
            self._straggler,
            self._horizon,
        )
        alive, events = self.replicas, 0
        every = np.arange(self.replicas)
        while alive:
            then, what = self._next()
            events += alive
            dt = np.where(what < 0, 0.0, then - self.now)
            running = self.phase == RUN
            self.progress.advance(dt * running)
            self.spent_s[_CATEGORY[self.phase], every] += dt * ~running
            np.copyto(self.now, then, where=what >= 0)
            for kind, handle in enumerate(handlers):
                which = np.flatnonzero(what == kind)
                if len(which):
                    handle(which)
                    alive -= len(which) if kind == HORIZON else 0
        return self._raw(events)

    def _next(self) -> tuple[np.ndarray, np.ndarray]:
        """Time and kind of every replica's next event; kind -1 for one that has reached the horizon."""
        then = self.clock[0].copy()
        what = np.zeros(self.replicas, dtype=np.int8)
        for kind in range(1, 6):
            sooner = self.clock[kind] < then
            np.copyto(then, self.clock[kind], where=sooner)
            what[sooner] = kind
        what[np.isinf(then)] = -1
        return then, what

    def _raw(self, events: int) -> Raw:
        seconds = dict(zip(CATEGORIES, self.spent_s, strict=True))
        seconds["checkpoint_block"] = seconds["checkpoint_block"] + self.progress.blocked_s
        seconds["step"] = self.progress.total[0]
        seconds["recompute"] = self.progress.undone_s
        return Raw(seconds, self.progress.total[1], self.failures, self.by_kind, self.waits, events)

    # --- failures

    def _failure(self, which: np.ndarray) -> None:
        fleet = self.fleet
        idle = (fleet.warm[which] + fleet.cold[which]) * self.setting.spares_fail
        of_a_spare = self.draws.chance("cause", len(which)) * (fleet.active[which] + idle) >= fleet.active[which]
        if of_a_spare.any():
            self._spare_fails(which[of_a_spare])
            which = which[~of_a_spare]
        kind, lost, hardware = self.draws.fault(len(which))
        lost = np.minimum(lost, fleet.active[which])
        self.failures[which] += 1
        self.by_kind += np.bincount(kind, minlength=len(KINDS))
        self._lose_state(which, kind, lost)
        fleet.active[which] -= lost
        self.lost[which] += lost
        gone = lost > 0
        if gone.any():
            away_s = self.draws.repair_s(hardware[gone])
            fleet.away(which[gone], self.now[which[gone]] + away_s, lost[gone])
        self._enter(which, DETECT, self.detect_s[kind])

    def _lose_state(self, which: np.ndarray, kind: np.ndarray, lost: np.ndarray) -> None:
        """Go back to the best tier that survives this fault, and what went wrong before in the same recovery."""
        survives = self.survives[kind]
        again = self.recovering[which]
        if again.any():
            # A second node of the same recovery may be the one that held the first one's copy.
            share = lost * self.lost[which] / np.maximum(self.fleet.active[which], 1)
            survives &= ~(again & (self.draws.chance("cause", len(which)) < share))
            survives &= self.from_memory[which] | ~again
        self.progress.restore_memory(which[survives & ~again])
        self.progress.restore_storage(which[~survives & (self.from_memory[which] | ~again)])
        self.from_memory[which] = survives
        self.recovering[which] = True

    def _spare_fails(self, which: np.ndarray) -> None:
        fleet = self.fleet
        cold = fleet.cold[which] > 0
        fleet.cold[which] -= cold
        fleet.warm[which] -= ~cold
        hardware = np.ones(len(which), dtype=bool)
        fleet.away(which, self.now[which] + self.draws.repair_s(hardware), np.ones(len(which)))
        self._keep_warm(which)
        self._expose(which)

    # --- phases

    def _enter(self, which: np.ndarray, phase: int, takes_s: np.ndarray | float) -> None:
        self.phase[which] = phase
        self.clock[PHASE_ENDS, which] = self.now[which] + takes_s
        self._expose(which)

    def _phase_ends(self, which: np.ndarray) -> None:
        phase = self.phase[which]
        for ended in (DETECT, REPLACE, RESTORE, PAUSE):
            of = which[phase == ended]
            if len(of):
                (self._replace, self._restore, self._restored, self._restore)[(DETECT, REPLACE, RESTORE, PAUSE).index(ended)](of)
        self._go(which[(phase == START) | (phase == RESIZE)])

    def _replace(self, which: np.ndarray) -> None:
        """Standbys and spares take the places of what was lost; without any, fewer go on, or all wait."""
        setting, policy, fleet = self.setting, self.setting.policy, self.fleet
        missing = setting.nodes - fleet.active[which]
        warm = np.minimum(fleet.warm[which], missing)
        least = missing - setting.nodes + setting.min_nodes if policy.elastic else missing
        cold = np.minimum(fleet.cold[which], np.maximum(least - warm, 0))
        active = fleet.active[which] + warm + cold
        enough = active >= setting.min_nodes
        # Sizes in steps: what is over stays warm.
        over = np.where(enough & (active < setting.nodes), active % setting.size_step, 0)
        takes_s = np.select(
            [cold > 0, (warm > 0), (self.lost[which] > 0) & (missing > 0), fleet.warm[which] > 0],
            [policy.swap_cold_s, policy.swap_warm_s, policy.shrink_s, policy.takeover_s],
            policy.restart_s,
        )
        fleet.active[which] = active - over
        fleet.warm[which] += over - warm
        fleet.cold[which] -= cold
        self.lost[which] = np.where(enough, 0, self.lost[which])
        takes_s = takes_s + self.draws.human_s(len(which))
        self._enter(which[enough], REPLACE, takes_s[enough])
        waiting = which[~enough]
        self.waits[waiting] += self.phase[waiting] != WAIT
        self._enter(waiting, WAIT, np.inf)
        self._keep_warm(which)

    def _restore(self, which: np.ndarray) -> None:
        policy = self.setting.policy
        takes_s = np.where(self.from_memory[which], policy.memory_restore_s, policy.storage_restore_s)
        self._enter(which, RESTORE, takes_s)

    def _restored(self, which: np.ndarray) -> None:
        if self.setting.restore_fails:
            failed = self.draws.chance("restore", len(which)) < self.setting.restore_fails
            memory = self.from_memory[which]
            self.progress.restore_storage(which[failed & memory])
            self.progress.restore_older_storage(which[failed & ~memory])
            self.from_memory[which[failed]] = False
            self._restore(which[failed])
            which = which[~failed]
        self._go(which)

    def _go(self, which: np.ndarray) -> None:
        """Train, or first take in the standbys that became ready meanwhile."""
        self.recovering[which] = False
        self.lost[which] = 0
        self._set_speed(which)
        more = self._room(which)
        self._enter(which[~more], RUN, np.inf)
        self._grow(which[more])

    def _room(self, which: np.ndarray) -> np.ndarray:
        if not self.setting.policy.elastic:
            return np.zeros(len(which), dtype=bool)
        missing = self.setting.nodes - self.fleet.active[which]
        return (missing > 0) & (self.fleet.warm[which] >= np.minimum(self.setting.size_step, missing))

    def _grow(self, which: np.ndarray) -> None:
        """At a step boundary: nothing is lost, the world is formed anew with more."""
        if not len(which):
            return
        fleet, step = self.fleet, self.setting.size_step
        missing = self.setting.nodes - fleet.active[which]
        more = np.minimum(fleet.warm[which], missing)
        more = np.where(more < missing, more // step * step, more)
        fleet.active[which] += more
        fleet.warm[which] -= more
        self._set_speed(which)
        self._enter(which, RESIZE, self.setting.policy.grow_s)

    # --- nodes

    def _node_back(self, which: np.ndarray) -> None:
        self.fleet.back(which)
        self._keep_warm(which)
        self.clock[NODE_BACK, which] = self.fleet.next_s[which]
        waiting = self.phase[which] == WAIT
        self._replace(which[waiting])
        which = which[~waiting]
        more = (self.phase[which] == RUN) & self._room(which)
        self._expose(which[~more])
        self._grow(which[more])

    def _keep_warm(self, which: np.ndarray) -> None:
        policy = self.setting.policy
        wanted = np.full(len(which), float(self.setting.standbys))
        if policy.elastic:
            wanted += self.setting.nodes - self.fleet.active[which]
        self.fleet.keep_warm(which, wanted, self.now[which], policy.swap_cold_s)

    def _set_speed(self, which: np.ndarray) -> None:
        active = self.fleet.active[which]
        if self.setting.speeds:
            nodes, speeds = np.array(self.setting.speeds).T
            speed = np.interp(active, nodes, speeds) / np.interp(self.setting.nodes, nodes, speeds)
        else:
            speed = active / self.setting.nodes
        self.progress.speed[1, which] = np.where(self.slow[which], self.setting.straggler_speed, 1.0) * speed

    def _expose(self, which: np.ndarray) -> None:
        """Draw the next failure anew: exact, because only the time since now matters for what is to come."""
        fleet, setting = self.fleet, self.setting
        exposed = fleet.active[which] + (fleet.warm[which] + fleet.cold[which]) * setting.spares_fail
        when = self.draws.failure_s(self.now[which], exposed)
        if not setting.failures_during_recovery:
            when = np.where(self.phase[which] == RUN, when, np.inf)
        self.clock[FAILURE, which] = when
        self.clock[NODE_BACK, which] = fleet.next_s[which]

    # --- what is not a failure

    def _planned(self, which: np.ndarray) -> None:
        """Save, stop for the pause, restore. One that falls into a recovery is done along with it."""
        setting = self.setting
        self.clock[PLANNED, which] = self.now[which] + self.draws.every_s(
            "planned", setting.planned_every_s, len(which)
        )
        which = which[self.phase[which] == RUN]
        self.progress.save(which)
        self.from_memory[which] = False
        self._enter(which, PAUSE, setting.policy.storage_block_s + setting.planned_pause_s)

    def _straggler(self, which: np.ndarray) -> None:
        """A node becomes slow; later it is noticed and swapped at a snapshot, if there is one to take its place."""
        setting, policy, fleet = self.setting, self.setting.policy, self.fleet
        new = which[~self.slow[which]]
        self.slow[new] = True
        self.clock[STRAGGLER, new] = self.now[new] + policy.straggler_notice_s
        self._set_speed(new)
        noticed = which[self.slow[which] & ~np.isin(which, new)]
        ready = (self.phase[noticed] == RUN) & (fleet.warm[noticed] + fleet.cold[noticed] > 0)
        self.clock[STRAGGLER, noticed[~ready]] = self.now[noticed[~ready]] + _AGAIN_S
        which = noticed[ready]
        if not len(which):
            return
        warm = fleet.warm[which] > 0
        fleet.warm[which] -= warm
        fleet.cold[which] -= ~warm
        away_s = self.draws.repair_s(np.zeros(len(which), dtype=bool))
        fleet.away(which, self.now[which] + away_s, np.ones(len(which)))
        self.slow[which] = False
        self._set_speed(which)
        self.clock[STRAGGLER, which] = self.now[which] + self.draws.every_s(
            "straggler", setting.straggler_every_s, len(which)
        )
        self._enter(which, RESIZE, np.where(warm, policy.swap_warm_s, policy.swap_cold_s))
        self._keep_warm(which)

    def _horizon(self, which: np.ndarray) -> None:
        self.clock[:, which] = np.inf

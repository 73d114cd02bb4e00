"""The discrete-event engine: thousands of replicas of one job, each at its own time, advanced together.

A replica is always in one phase (running, detecting, replacing, ...) and has a clock for everything that can happen
next. One turn of the loop takes every replica to its own next event and handles the replicas by the kind of it, so the
cost of Python is shared by all of them. **An event is one state transition of one replica**: a failure, the end of
a phase (start, detection, replacement, restore, resize, planned pause), a node that comes back or is warm, a planned
interruption, a straggler that appears or is noticed, the end of the horizon. Snapshots are not events: between two
events they are a closed form (`progress`).
"""

from __future__ import annotations

import numpy as np

from tigerbot_jobs.simulate.mixes import KINDS
from tigerbot_jobs.simulate.phases import (
    CATEGORIES,
    CATEGORY_OF_PHASE,
    DETECT,
    HORIZON,
    PAUSE,
    PLANNED,
    REPLACE,
    RESIZE,
    RESTORE,
    RUN,
    START,
    STRAGGLER,
    WAIT,
    Raw,
)
from tigerbot_jobs.simulate.replicas import Replicas
from tigerbot_jobs.simulate.setting import Setting

_AGAIN_S = 3600.0  # a straggler that could not be swapped is looked at again


class Engine(Replicas):
    """R replicas of a setting from time 0 to its horizon."""

    def __init__(self, setting: Setting, replicas: int, seed: int) -> None:
        super().__init__(setting, replicas, seed)
        policy = setting.policy
        self._detect_s = np.array([getattr(policy, f"detect_{kind}_s") for kind in KINDS])
        self._cause_detect_s = np.array([_given(cause.detect_s) for cause in setting.causes])
        self._cause_recover_s = np.array([_given(cause.recover_s) for cause in setting.causes])
        self._recover_s = np.full(replicas, np.nan)  # of the cause being recovered from, where it has its own
        self._survives = np.array([setting.tiers.memory and kind in policy.memory_survives for kind in KINDS])

    def run(self) -> Raw:
        """Simulate to the horizon."""
        handlers = (self._phase_ends, self._failure, self._node_back, self._planned, self._straggler, self._horizon)
        alive, events = self.replicas, 0
        every = np.arange(self.replicas)
        while alive:
            then, what = self._next()
            events += alive
            there = what >= 0
            dt = np.where(there, then, self.now) - self.now
            running = self.phase == RUN
            self.progress.advance(dt * running)
            self.spent_s[CATEGORY_OF_PHASE[self.phase], every] += dt * ~running
            np.copyto(self.now, then, where=there)
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
        for kind in range(1, len(self.clock)):
            sooner = self.clock[kind] < then
            np.copyto(then, self.clock[kind], where=sooner)
            np.copyto(what, np.int8(kind), where=sooner)
        what[np.isinf(then)] = -1
        return then, what

    def _raw(self, events: int) -> Raw:
        seconds: dict[str, np.ndarray] = dict(zip(CATEGORIES, self.spent_s, strict=True))
        seconds["checkpoint_block"] = seconds["checkpoint_block"] + self.progress.blocked_s
        seconds["step"] = self.progress.total[0]
        seconds["recompute"] = self.progress.undone_s
        return Raw(seconds, self.progress.total[1], self.failures, self.waits, self.by_kind, events)

    # --- failures

    def _failure(self, which: np.ndarray) -> None:
        fleet = self.fleet
        struck = self.draws.chance("cause", len(which)) * self.exposed[which]
        active, idle = fleet.active[which], fleet.warm[which] + fleet.cold[which]
        of_the_job = struck < active
        if not of_the_job.all():
            of_a_spare = ~of_the_job & (struck < active + idle * self.setting.spares_fail)
            self._spare_fails(which[of_a_spare])
            self.expose(which[~of_the_job])
            which = which[of_the_job]
        cause, kind, lost, hardware = self.draws.fault(len(which))
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
        self._recover_s[which] = self._cause_recover_s[cause]
        own_s = self._cause_detect_s[cause]
        self.enter(which, DETECT, np.where(np.isnan(own_s), self._detect_s[kind], own_s))
        self.expose(which)

    def _lose_state(self, which: np.ndarray, kind: np.ndarray, lost: np.ndarray) -> None:
        """Go back to the best tier that survives this fault and those before it in the same recovery."""
        survives = self._survives[kind]
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
        cold = self.fleet.cold[which] > 0
        self.fleet.cold[which] -= cold
        self.fleet.warm[which] -= ~cold
        hardware = np.ones(len(which), dtype=bool)
        self.fleet.away(which, self.now[which] + self.draws.repair_s(hardware), np.ones(len(which)))
        self.keep_warm(which)

    # --- phases

    def _phase_ends(self, which: np.ndarray) -> None:
        phase = self.phase[which]
        for handle, ended in (
            (self._replace, phase == DETECT),
            (self._restore, (phase == REPLACE) | (phase == PAUSE)),
            (self._restored, phase == RESTORE),
            (self._go, (phase == START) | (phase == RESIZE)),
        ):
            if ended.any():
                handle(which[ended])

    def _replace(self, which: np.ndarray) -> None:
        """Standbys and spares take the places of what was lost; without any, fewer go on, or all wait."""
        setting, policy, fleet = self.setting, self.setting.policy, self.fleet
        missing = setting.nodes - fleet.active[which]
        warm = np.minimum(fleet.warm[which], missing)
        least = missing - setting.nodes + setting.min_nodes if policy.elastic else missing
        cold = np.minimum(fleet.cold[which], np.maximum(least - warm, 0))
        active = fleet.active[which] + warm + cold
        enough = active >= setting.min_nodes
        over = np.where(enough & (active < setting.nodes), active % setting.size_step, 0)  # stays warm
        takes_s = np.select(
            [cold > 0, warm > 0, (self.lost[which] > 0) & (missing > 0), fleet.warm[which] > 0],
            [policy.swap_cold_s, policy.swap_warm_s, policy.shrink_s, policy.takeover_s],
            policy.restart_s,
        )
        fleet.active[which] = active - over
        fleet.warm[which] += over - warm
        fleet.cold[which] -= cold
        own_s = self._recover_s[which]
        takes_s = np.where(np.isnan(own_s), takes_s, own_s) + self.draws.human_s(len(which))
        self.enter(which[enough], REPLACE, takes_s[enough])
        waiting = which[~enough]
        self.waits[waiting] += self.phase[waiting] != WAIT
        self.enter(waiting, WAIT, np.inf)
        self.keep_warm(which)
        self.spares_moved_in(which)

    def _restore(self, which: np.ndarray) -> None:
        policy = self.setting.policy
        takes_s = np.where(self.from_memory[which], policy.memory_restore_s, policy.storage_restore_s)
        self.enter(which, RESTORE, takes_s)

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
        self.set_speed(which)
        more = self.room(which)
        self.enter(which[~more], RUN, np.inf)
        self.grow(which[more])

    # --- what is not a failure

    def _node_back(self, which: np.ndarray) -> None:
        self.fleet.back(which)
        self.keep_warm(which)
        self.expose(which)
        waiting = self.phase[which] == WAIT
        if waiting.any():
            self._replace(which[waiting])
            which = which[~waiting]
        self.grow(which[(self.phase[which] == RUN) & self.room(which)])

    def _planned(self, which: np.ndarray) -> None:
        """Save, stop for the pause, restore. One that falls into a recovery is done along with it."""
        setting = self.setting
        gap_s = self.draws.every_s("planned", setting.planned_every_s, len(which))
        self.clock[PLANNED, which] = self.now[which] + gap_s
        which = which[self.phase[which] == RUN]
        self.progress.save(which)
        self.from_memory[which] = False
        self.enter(which, PAUSE, setting.policy.storage_block_s + setting.planned_pause_s)

    def _straggler(self, which: np.ndarray) -> None:
        """A node becomes slow; when that is noticed it is swapped at a snapshot, if a spare can take its place."""
        slow = self.slow[which]
        new, noticed = which[~slow], which[slow]
        self.slow[new] = True
        self.set_speed(new)
        self.clock[STRAGGLER, new] = self.now[new] + self.setting.policy.straggler_notice_s
        spares = self.fleet.warm[noticed] + self.fleet.cold[noticed]
        ready = (self.phase[noticed] == RUN) & (spares > 0)
        self.clock[STRAGGLER, noticed[~ready]] = self.now[noticed[~ready]] + _AGAIN_S
        if ready.any():
            self._swap_straggler(noticed[ready])

    def _swap_straggler(self, which: np.ndarray) -> None:
        fleet, policy = self.fleet, self.setting.policy
        warm = fleet.warm[which] > 0
        fleet.warm[which] -= warm
        fleet.cold[which] -= ~warm
        away_s = self.draws.repair_s(np.zeros(len(which), dtype=bool))
        fleet.away(which, self.now[which] + away_s, np.ones(len(which)))
        self.slow[which] = False
        self.set_speed(which)
        gap_s = self.draws.every_s("straggler", self.setting.straggler_every_s, len(which))
        self.clock[STRAGGLER, which] = self.now[which] + gap_s
        self.enter(which, RESIZE, np.where(warm, policy.swap_warm_s, policy.swap_cold_s))
        self.keep_warm(which)
        self.spares_moved_in(which)

    def _horizon(self, which: np.ndarray) -> None:
        self.clock[:, which] = np.inf


def _given(value: float | None) -> float:
    return np.nan if value is None else value

"""The state of R replicas of one job, and the moves that several events have in common.

Shapes: every array has one entry per replica. A method's `which` is an array of replica numbers.
"""

from __future__ import annotations

import numpy as np

from tigerbot_jobs.simulate.draws import Draws
from tigerbot_jobs.simulate.fleet import Fleet
from tigerbot_jobs.simulate.mixes import KINDS
from tigerbot_jobs.simulate.phases import (
    CATEGORIES,
    FAILURE,
    HORIZON,
    NODE_BACK,
    PHASE_ENDS,
    PLANNED,
    RESIZE,
    RUN,
    START,
    STRAGGLER,
)
from tigerbot_jobs.simulate.progress import Progress
from tigerbot_jobs.simulate.setting import Setting


class Replicas:
    """Where every replica is: its time, its phase, its clocks, its nodes, its training.

    Attributes:
        clock: (6, R): when each kind of event comes next, infinite when it does not.
        from_memory: which tier the recovery under way restores from.
        recovering: a failure has happened since training last ran, and `lost` nodes with it.
        slow: one of the nodes is a straggler.
    """

    def __init__(self, setting: Setting, replicas: int, seed: int) -> None:
        self.setting, self.replicas = setting, replicas
        self.draws = Draws(setting, seed)
        self.progress = Progress(setting.tiers, replicas)
        self.fleet = Fleet(replicas, setting.nodes, setting.standbys, setting.spares - setting.standbys)
        self.now = np.zeros(replicas)
        self.phase = np.full(replicas, START)
        self.from_memory = np.zeros(replicas, dtype=bool)
        self.recovering = np.zeros(replicas, dtype=bool)
        self.lost = np.zeros(replicas)
        self.slow = np.zeros(replicas, dtype=bool)
        self.spent_s = np.zeros((len(CATEGORIES), replicas))
        self.by_kind = np.zeros(len(KINDS), dtype=np.int64)
        self.failures = np.zeros(replicas, dtype=np.int64)
        self.waits = np.zeros(replicas, dtype=np.int64)
        self.exposed = np.zeros(replicas)
        self.clock = np.full((6, replicas), np.inf)
        self.fleet.next_s = self.clock[NODE_BACK]  # one array: the fleet sets its own clock
        self.clock[PHASE_ENDS] = setting.start_s
        self.clock[PLANNED] = self.draws.every_s("planned", setting.planned_every_s, replicas)
        self.clock[STRAGGLER] = self.draws.every_s("straggler", setting.straggler_every_s, replicas)
        self.clock[HORIZON] = setting.horizon_s
        self.expose(np.arange(replicas))

    def enter(self, which: np.ndarray, phase: int, takes_s: np.ndarray | float) -> None:
        """Be in a phase for so long."""
        self.phase[which] = phase
        self.clock[PHASE_ENDS, which] = self.now[which] + takes_s
        if not self.setting.failures_during_recovery:
            self.expose(which)

    def expose(self, which: np.ndarray) -> None:
        """Draw the next failure anew, which is exact: only the time from now on matters for what is to come.

        Called when more may fail than before; where fewer may, `exposed` keeps the larger number and a failure that
        hits nobody is dropped when it comes.
        """
        fleet, setting = self.fleet, self.setting
        spares = fleet.warm[which] + fleet.cold[which] + fleet.warming[which]
        self.exposed[which] = fleet.active[which] + spares * setting.spares_fail
        when = self.draws.failure_s(self.now[which], self.exposed[which])
        if not setting.failures_during_recovery:
            when = np.where(self.phase[which] == RUN, when, np.inf)
        self.clock[FAILURE, which] = when

    def spares_moved_in(self, which: np.ndarray) -> None:
        """Spares became part of the job, and may fail more often now."""
        if self.setting.spares_fail != 1:
            self.expose(which)

    def keep_warm(self, which: np.ndarray) -> None:
        """Warm idle nodes up to the standbys wanted, and for every place in the job that is empty."""
        policy = self.setting.policy
        wanted = np.full(len(which), float(self.setting.standbys))
        if policy.elastic:
            wanted += self.setting.nodes - self.fleet.active[which]
        self.fleet.keep_warm(which, wanted, self.now[which], policy.swap_cold_s)

    def room(self, which: np.ndarray) -> np.ndarray:
        """Where the job can take in standbys."""
        if not self.setting.policy.elastic:
            return np.zeros(len(which), dtype=bool)
        missing = self.setting.nodes - self.fleet.active[which]
        return (missing > 0) & (self.fleet.warm[which] >= np.minimum(self.setting.size_step, missing))

    def grow(self, which: np.ndarray) -> None:
        """At a step boundary: nothing is lost, the world is formed anew with more."""
        if not len(which):
            return
        fleet, step = self.fleet, self.setting.size_step
        missing = self.setting.nodes - fleet.active[which]
        more = np.minimum(fleet.warm[which], missing)
        more = np.where(more < missing, more // step * step, more)
        fleet.active[which] += more
        fleet.warm[which] -= more
        self.set_speed(which)
        self.enter(which, RESIZE, self.setting.policy.grow_s)
        self.spares_moved_in(which)

    def set_speed(self, which: np.ndarray) -> None:
        """The speed that goes with the nodes there are, and with a straggler among them."""
        setting, active = self.setting, self.fleet.active[which]
        if setting.speeds:
            nodes, speeds = np.array(setting.speeds).T
            speed = np.interp(active, nodes, speeds) / np.interp(setting.nodes, nodes, speeds)
        else:
            speed = active / setting.nodes
        self.progress.speed[1, which] = np.where(self.slow[which], setting.straggler_speed, 1.0) * speed

"""All timeouts of a run in one place, each clearly longer than the one inside it.

When an outer timeout fires first, the inner one never gets to say what happened: a process group that gives up before
the phase watcher kills a survivor's whole life for what would have been one named rank; Ray's health check before the
rendezvous restarts everybody while they are forming a group. torchtitan #2899 measured an order that works, torchft
#329 what it costs to make all of them huge.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

from tigerbot.errors import SpecError

APART = 1.25  # a timeout is at least this much longer than the one inside it


@dataclass(frozen=True)
class Timeouts:
    """Seconds, inner to outer.

    Args:
        phase_s: the phase watcher names a hung rank (at the longest of its usual deadlines).
        group_s: a collective of the process group gives up.
        rendezvous_s: a generation that does not form is given up.
        health_s: Ray takes a worker that does not answer for dead.
        job_s: the run is given up when no worker can be had.

    Raises:
        SpecError: one is not clearly longer than the one before it.
    """

    phase_s: float
    group_s: float
    rendezvous_s: float
    health_s: float
    job_s: float

    def __post_init__(self) -> None:
        names = [one.name for one in fields(self)]
        if not self.phase_s > 0:
            raise SpecError(
                f"{self.phase_s:g} s are no timeout", where="fault_tolerance.phase_s", fix="give a number above 0"
            )
        for inner, outer in pairwise(names):
            least = APART * getattr(self, inner)
            if not getattr(self, outer) >= least:
                raise SpecError(
                    f"{getattr(self, outer):g} s, but {inner} inside it is {getattr(self, inner):g} s",
                    where=f"fault_tolerance.{outer}",
                    fix=f"give at least {least:g} s, or shorten {inner}",
                )

    @property
    def evidence(self) -> str:
        """The ladder in one line."""
        return " < ".join(f"{one.name.removesuffix('_s')} {getattr(self, one.name):g} s" for one in fields(self))


def ladder(phase_s: float) -> Timeouts:
    """The ladder over a phase deadline: 30 s give a group of 60 s, rendezvous 90 s, health 180 s, job 30 min.

    Args:
        phase_s: the longest deadline of a phase with a collective in it (`PhaseTimes.deadline_s`, times its factor for
            slow ranks).
    """
    group_s = max(2.0 * phase_s, phase_s + 10.0)
    rendezvous_s = 1.5 * group_s
    health_s = 2.0 * rendezvous_s
    return Timeouts(phase_s, group_s, rendezvous_s, health_s, max(1800.0, 2.0 * health_s))

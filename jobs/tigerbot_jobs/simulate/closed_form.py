"""Closed forms for one tier of checkpoints under exponential failures: what the simulator must agree with.

M is the mean time between failures of the whole job, R the time from a failure to training again, d what a checkpoint
blocks, t the work between two checkpoints. All in the same unit.
"""

from __future__ import annotations

import math


def goodput(t: float, d: float, mtbf: float, recovery: float, *, failures_during_recovery: bool = False) -> float:
    """Share of the time that is work which stays done.

    Without failures during recovery a segment of length t + d takes (exp((t+d)/M) - 1)(M + R) on average; with them
    R becomes M (exp(R/M) - 1), the expected time until one recovery gets through (Daly 2006).
    """
    pause = mtbf * math.expm1(recovery / mtbf) if failures_during_recovery else recovery
    return t / (math.expm1((t + d) / mtbf) * (mtbf + pause))


def young(d: float, mtbf: float) -> float:
    """Young's interval sqrt(2 d M): near the best where d is far below M."""
    return math.sqrt(2 * d * mtbf)


def daly(d: float, mtbf: float) -> float:
    """Daly's interval, for d that is not small against M."""
    if d >= 2 * mtbf:
        return mtbf
    part = d / (2 * mtbf)
    return young(d, mtbf) * (1 + math.sqrt(part) / 3 + part / 9) - d

"""What a replica can be in, what can happen to it next, and what a simulation gives back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# What a replica's next event can be: a clock each.
PHASE_ENDS, FAILURE, NODE_BACK, PLANNED, STRAGGLER, HORIZON = range(6)
# What a replica is in.
RUN, START, DETECT, REPLACE, WAIT, RESTORE, RESIZE, PAUSE = range(8)
# The ledger's categories that have time here, and which of them a phase is; running is split by `progress`.
CATEGORIES = ("start", "restore", "checkpoint_block", "hang_wait", "resize", "idle_after_failure", "other")
CATEGORY_OF_PHASE = np.array([2, 0, 3, 5, 5, 1, 4, 6])


@dataclass(frozen=True)
class Raw:
    """What R replicas went through: arrays of length R.

    Attributes:
        seconds: by ledger category; they sum to the horizon.
        work_s: seconds of training at full speed that are part of the final history.
        failures, waits: how many, and how often training waited for a node to come back.
        by_kind: failures by kind, over all replicas.
        events: state transitions of all replicas.
    """

    seconds: dict[str, np.ndarray]
    work_s: np.ndarray
    failures: np.ndarray
    waits: np.ndarray
    by_kind: np.ndarray
    events: int

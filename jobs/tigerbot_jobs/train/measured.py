"""A run that really happened as the simulator's input: the same quantities, measured instead of assumed.

Nothing of the run's goodput goes in: predicting that is what the simulator is held against.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean, median

from tigerbot_jobs.train.goodput import Account
from tigerbot_jobs.train.timeline import Incident


@dataclass(frozen=True)
class Faults:
    """One kind of fault that stopped training. Medians; zero where no incident of the kind shows it.

    Attributes:
        per_hour: how often, per hour of wall time.
        mttd_s: end of the last finished step to the fault's being seen.
        mttr_s: from there to the end of the first new step.
        steps_lost: mean number of steps that were undone.
        from_memory: most of them were restored from the memory tier.
    """

    kind: str
    per_hour: float
    mttd_s: float
    mttr_s: float
    steps_lost: float
    from_memory: bool


@dataclass(frozen=True)
class Measured:
    """What a ledger says of a run. Zero where the run did not show it.

    Attributes:
        start_s: from submission to the first step.
        step_s: a turn of the loop without snapshot, checkpoint, validation and waiting for data, median.
        other_s_per_step: waiting for data and validation, mean.
        snapshot_every_steps, snapshot_every_s: distance of two snapshots; snapshot_block_s is what one held up.
        checkpoint_every_s: distance of two states in storage; checkpoint_block_s is what one held up, checkpoint_write_s
            how long it took to be there.
        mttd_s, mttr_s: medians over all kinds.
    """

    wall_s: float
    workers: int
    start_s: float
    step_s: float
    other_s_per_step: float
    snapshot_every_steps: int
    snapshot_every_s: float
    snapshot_block_s: float
    checkpoint_every_s: float
    checkpoint_block_s: float
    checkpoint_write_s: float
    mttd_s: float
    mttr_s: float
    faults: tuple[Faults, ...]


def measured(account: Account) -> Measured:
    """Measure a run by its account."""
    turns, stored = account.timeline.turns, account.timeline.persisted
    snapshots = [turn for turn in turns if turn.snapshot_s > 0]
    # A rollback makes the step number fall: no distance of two snapshots.
    distance = round(_middle(b.step - a.step for a, b in pairwise(snapshots) if b.step > a.step))
    down = [loss.incident for loss in account.losses if loss.incident.down_from is not None]
    kinds = sorted({incident.faults[0].kind for incident in down})
    return Measured(
        wall_s=account.wall_s,
        workers=max((turn.world_size for turn in turns), default=0),
        start_s=turns[0].start if turns else 0.0,
        step_s=_middle(turn.computing_s for turn in turns),
        other_s_per_step=mean([turn.data_s + turn.eval_s for turn in turns] or [0.0]),
        snapshot_every_steps=distance,
        snapshot_every_s=distance * _middle(turn.total_s for turn in turns),
        snapshot_block_s=_middle(turn.snapshot_s for turn in snapshots),
        checkpoint_every_s=_middle(b.at - a.at for a, b in pairwise(stored)),
        checkpoint_block_s=_middle(turn.checkpoint_s for turn in turns if turn.checkpoint_s > 0),
        checkpoint_write_s=_middle(state.seconds for state in stored),
        mttd_s=_middle(account.mttd_s),
        mttr_s=_middle(account.mttr_s),
        faults=tuple(_faults([i for i in down if i.faults[0].kind == kind], account.wall_s) for kind in kinds),
    )


def _faults(incidents: list[Incident], wall_s: float) -> Faults:
    return Faults(
        kind=incidents[0].faults[0].kind,
        per_hour=len(incidents) * 3600 / wall_s if wall_s else 0.0,
        mttd_s=_middle(incident.mttd_s for incident in incidents if incident.mttd_s is not None),
        mttr_s=_middle(incident.mttr_s for incident in incidents if incident.mttr_s is not None),
        steps_lost=mean(len(incident.undone) for incident in incidents),
        from_memory=sum(incident.tier == "memory" for incident in incidents) * 2 > len(incidents),
    )


def _middle(values: Iterable[float]) -> float:
    kept = list(values)
    return float(median(kept)) if kept else 0.0

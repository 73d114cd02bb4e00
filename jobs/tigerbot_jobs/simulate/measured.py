"""What a run's ledger says of its parts, as the simulator takes them. The run's goodput is not among them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

from tigerbot_jobs.simulate.predict import LedgerSummary, MeasuredFault
from tigerbot_jobs.train.goodput import Account
from tigerbot_jobs.train.timeline import Incident


def summarize(account: Account) -> LedgerSummary:
    """The summary of a run that made at least one step.

    Raises:
        ValueError: it made none.
    """
    line = account.timeline
    turns = [turn for turn in line.turns if not turn.undone]
    if not turns:
        raise ValueError("a run without a step says nothing")

    snapshots = [turn.snapshot_s for turn in turns if turn.snapshot_s > 0]
    gaps = [later.at - earlier.at for earlier, later in pairwise(line.persisted)]
    return LedgerSummary(
        wall_s=account.wall_s,
        start_s=turns[0].start,
        step_s=statistics.mean(turn.computing_s for turn in turns),
        snapshot_every_steps=round(len(turns) / len(snapshots)) if snapshots else 0,
        snapshot_block_s=_mean(snapshots),
        checkpoint_every_s=_mean(gaps) or account.wall_s,
        checkpoint_block_s=_mean([turn.checkpoint_s for turn in turns if turn.checkpoint_s > 0]),
        checkpoint_write_s=_mean([one.seconds for one in line.persisted]),
        faults=tuple(_faults([loss.incident for loss in account.losses], account.wall_s)),
        other_s_per_step=statistics.mean(turn.data_s + turn.eval_s for turn in turns),
    )


def _faults(incidents: Sequence[Incident], wall_s: float) -> list[MeasuredFault]:
    """By kind; those that training never stopped for cost nothing to predict."""
    by_kind: dict[str, list[Incident]] = defaultdict(list)
    for incident in incidents:
        if incident.mttr_s is not None and incident.mttd_s is not None:
            by_kind[incident.kind].append(incident)
    return [
        MeasuredFault(
            kind,
            per_hour=len(found) * 3600 / wall_s,
            detect_s=_mean([one.mttd_s or 0.0 for one in found]),
            recover_s=_mean([one.mttr_s or 0.0 for one in found]),
            from_memory=all(one.tier == "memory" for one in found),
        )
        for kind, found in by_kind.items()
    ]


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else 0.0

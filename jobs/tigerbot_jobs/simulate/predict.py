"""Predict the goodput of a small chaos run from what was measured in it, to hold the simulator against real runs.

Takes the medians or means a ledger gives (MTTD, MTTR, step time, snapshots, faults by kind) and simulates many runs of
that length. Nothing of the run's own goodput goes in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tigerbot_jobs.simulate.mixes import Cause
from tigerbot_jobs.simulate.outcome import Estimate, simulate
from tigerbot_jobs.simulate.plain import plain_setting
from tigerbot_jobs.simulate.setting import Tiers


@dataclass(frozen=True)
class MeasuredFault:
    """One kind of fault of a chaos run.

    Attributes:
        per_hour: how often, per hour of wall time.
        detect_s: MTTD, from the end of the last finished step to `fault_seen`.
        recover_s: MTTR, from `fault_seen` to the end of the first new step, restore included.
        from_memory: it restored from the memory tier; else from the last storage checkpoint.
    """

    kind: str
    per_hour: float
    detect_s: float
    recover_s: float
    from_memory: bool = True


@dataclass(frozen=True)
class LedgerSummary:
    """What a ledger says about a run, without its goodput.

    Attributes:
        wall_s: length of the run, from submission.
        start_s: from submission to the first step.
        step_s: an undisturbed step, without data wait, snapshot and checkpoint.
        snapshot_every_steps: optimizer steps from one memory snapshot to the next; 0 when there is no memory tier.
        snapshot_block_s: what one snapshot adds to its step.
        checkpoint_every_s: work between two storage checkpoints.
        checkpoint_block_s, checkpoint_write_s: what one blocks, and how long after that it is valid.
        other_s_per_step: data wait, evaluation and the rest of an undisturbed loop turn.
    """

    wall_s: float
    start_s: float
    step_s: float
    snapshot_every_steps: int
    snapshot_block_s: float
    checkpoint_every_s: float
    checkpoint_block_s: float
    checkpoint_write_s: float
    faults: tuple[MeasuredFault, ...]
    other_s_per_step: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """Predicted goodput (share of wall time in steps that count): the mean run, and where 90% of runs lie."""

    goodput: Estimate
    shares: dict[str, float]


def predict(summary: LedgerSummary, *, replicas: int = 2000, seed: int = 1) -> Prediction:
    """Simulate runs of the summary's length with its faults at random times.

    Nothing happens before the first step: the faults of a chaos run are for what trains. A fault falls into a step: the half step that is lost on average is part of the measured MTTD and the first new
    step part of the measured MTTR, so both are taken out of them here; the simulator counts them itself.
    """
    turn_s = summary.step_s + summary.other_s_per_step
    training = 1 - summary.start_s / summary.wall_s
    per_hour = sum(fault.per_hour for fault in summary.faults) / training
    memory = summary.snapshot_every_steps > 0
    memory_every_s = turn_s * summary.snapshot_every_steps if memory else summary.checkpoint_every_s
    per = max(1, round(summary.checkpoint_every_s / memory_every_s))
    block_s = summary.snapshot_block_s if memory else 0.0
    setting = plain_setting(
        mtbf_s=3600 / per_hour if per_hour else float("inf"),
        every_s=summary.checkpoint_every_s,
        block_s=summary.checkpoint_block_s,
        recovery_s=0.0,
        horizon_s=summary.wall_s * training,
        failures_during_recovery=True,
    )
    setting = replace(
        setting,
        policy=replace(setting.policy, memory=memory, memory_survives=("process",), memory_restore_s=0.0),
        tiers=Tiers(memory, memory_every_s, block_s, per, summary.checkpoint_block_s, summary.checkpoint_write_s),
        causes=tuple(_cause(fault, turn_s) for fault in summary.faults) or setting.causes,
        start_s=0.0,
    )
    outcome = simulate(setting, replicas=replicas, seed=seed)
    stepping = summary.step_s / turn_s
    shares = {name: share * training for name, share in outcome.shares.items()}
    shares["start"] = shares.get("start", 0.0) + 1 - training
    shares["other"] += shares["step"] * (1 - stepping)
    shares["step"] *= stepping
    whole = outcome.step_time
    values = (whole.mean, whole.low, whole.high, whole.run_low, whole.run_high)
    return Prediction(Estimate(*(value * stepping * training for value in values)), shares)


def _cause(fault: MeasuredFault, turn_s: float) -> Cause:
    return Cause(
        name=fault.kind,
        count=fault.per_hour,
        kind="process" if fault.from_memory else "corruption",
        soft=1.0,
        detect_s=max(fault.detect_s - turn_s / 2, 0.0),
        recover_s=max(fault.recover_s - turn_s, 0.0),
    )

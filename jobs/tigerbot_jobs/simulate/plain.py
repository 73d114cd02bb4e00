"""A job with one tier of checkpoints and one kind of fault: all that the closed forms know."""

from __future__ import annotations

from dataclasses import replace

from tigerbot_jobs.simulate.mixes import Cause
from tigerbot_jobs.simulate.policies import OURS
from tigerbot_jobs.simulate.setting import Setting, Tiers


def plain_setting(
    *,
    mtbf_s: float,
    every_s: float,
    block_s: float,
    recovery_s: float,
    horizon_s: float,
    failures_during_recovery: bool = False,
) -> Setting:
    """Fails every `mtbf_s` on average, takes `recovery_s` to come back, saves after every `every_s` of work."""
    policy = replace(OURS, name="plain", memory=False, elastic=False, storage_restore_s=0.0)
    return Setting(
        name="plain",
        policy=policy,
        tiers=Tiers(False, every_s, 0.0, 1, block_s, 0.0),
        causes=(Cause("fault", 1, kind="process", detect_s=0.0, recover_s=recovery_s),),
        horizon_s=horizon_s,
        nodes=1,
        min_nodes=1,
        size_step=1,
        nodes_per_island=1,
        spares=0,
        standbys=0,
        node_mtbf_s=mtbf_s,
        failures_during_recovery=failures_during_recovery,
    )


def two_tiers(setting: Setting, *, memory_every_s: float, memory_block_s: float, storage_every_s: float) -> Setting:
    """The same job with a memory tier that every fault leaves whole, and a storage tier behind it."""
    per = max(1, round(storage_every_s / memory_every_s))
    tiers = Tiers(True, memory_every_s, memory_block_s, per, setting.tiers.storage_block_s, 0.0)
    policy = replace(setting.policy, memory=True, memory_survives=("process",), memory_restore_s=0.0)
    return replace(setting, tiers=tiers, policy=policy)

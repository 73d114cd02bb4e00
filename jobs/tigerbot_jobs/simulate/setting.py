"""One simulated situation, everything resolved: plain numbers, seconds and nodes, nothing automatic any more.

`settings(spec)` gives one per policy of a spec. The engine reads nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tigerbot.errors import InputError
from tigerbot.spec import PolicySpec, SimulateSpec
from tigerbot_jobs.simulate.closed_form import young
from tigerbot_jobs.simulate.mixes import MIXES, Cause, Mix
from tigerbot_jobs.simulate.policies import POLICIES, Policy

MEMORY_LONGEST_S = 600.0


@dataclass(frozen=True)
class Tiers:
    """When state is saved. A storage checkpoint follows every `memory_per_storage` memory snapshots.

    Without a memory tier every snapshot is a storage checkpoint: block 0 in memory, one per storage interval.
    """

    memory: bool
    memory_every_s: float
    memory_block_s: float
    memory_per_storage: int
    storage_block_s: float
    storage_write_s: float

    @property
    def storage_every_s(self) -> float:
        return self.memory_every_s * self.memory_per_storage

    @property
    def period_s(self) -> float:
        """From one storage checkpoint to the next, blocks included."""
        return self.memory_per_storage * (self.memory_every_s + self.memory_block_s) + self.storage_block_s


@dataclass(frozen=True)
class Setting:
    """What the engine simulates: one job, one policy."""

    name: str
    policy: Policy
    tiers: Tiers
    causes: tuple[Cause, ...]
    horizon_s: float
    nodes: int
    min_nodes: int
    size_step: int
    nodes_per_island: int
    spares: int
    standbys: int
    node_mtbf_s: float
    weibull_shape: float = 1.0
    soft_share: float = 0.0
    hang_share: float = 0.0
    spares_fail: float = 0.0
    failures_during_recovery: bool = True
    start_s: float = 0.0
    speeds: tuple[tuple[float, float], ...] = ()
    reboot: tuple[float, float] = (900.0, 0.2)
    hardware: tuple[float, float] = (228_600.0, 0.59)
    planned_every_s: float = math.inf
    planned_pause_s: float = 0.0
    human_probability: float = 0.0
    human: tuple[float, float] = (7200.0, 0.5)
    straggler_every_s: float = math.inf
    straggler_speed: float = 1.0
    restore_fails: float = 0.0

    @property
    def mtbf_s(self) -> float:
        """Mean time between failures of the whole job."""
        return self.node_mtbf_s / self.nodes


def settings(spec: SimulateSpec) -> list[Setting]:
    """One setting per policy of the spec.

    Raises:
        InputError: intervals that contradict each other, or two policies of one name.
    """
    found = [setting(spec, policy) for policy in spec.policies]
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise InputError(f"two policies are called {max(names, key=names.count)}", where="policies", fix="name one")
    return found


def setting(spec: SimulateSpec, wanted: PolicySpec) -> Setting:
    """The situation of one policy."""
    policy = _policy(wanted)
    mix = _mix(spec)
    node_mtbf_s = mix.card_hours * 3600 / spec.cards_per_node
    nodes = spec.cards // spec.cards_per_node
    least = nodes // 2 if spec.min_cards is None else math.ceil(spec.min_cards / spec.cards_per_node)
    stragglers = spec.straggler.per_node_day * nodes
    return Setting(
        name=policy.name,
        policy=policy,
        tiers=_tiers(policy, mix.causes, spec.step_s, node_mtbf_s / nodes),
        causes=mix.causes,
        horizon_s=spec.days * 86_400,
        nodes=nodes,
        min_nodes=max(least, 1) if policy.elastic else nodes,
        size_step=spec.size_step_nodes,
        nodes_per_island=spec.nodes_per_island,
        spares=spec.spares,
        standbys=min(policy.standbys, spec.spares),
        node_mtbf_s=node_mtbf_s,
        weibull_shape=spec.failures.weibull_shape,
        soft_share=spec.failures.soft_share,
        hang_share=spec.failures.hang_share,
        spares_fail=spec.failures.spares_fail,
        failures_during_recovery=spec.failures.during_recovery,
        start_s=policy.restart_s,
        speeds=tuple((cards / spec.cards_per_node, speed) for cards, speed in sorted(spec.throughput)),
        reboot=(spec.repair.reboot_median_s, spec.repair.reboot_sigma),
        hardware=(spec.repair.hardware_median_s, spec.repair.hardware_sigma),
        planned_every_s=86_400 / spec.planned.per_day if spec.planned.per_day else math.inf,
        planned_pause_s=spec.planned.pause_s,
        human_probability=spec.human.probability,
        human=(spec.human.median_s, spec.human.sigma),
        straggler_every_s=86_400 / stragglers if stragglers else math.inf,
        straggler_speed=spec.straggler.speed,
        restore_fails=spec.restore_fails,
    )


def _policy(wanted: PolicySpec) -> Policy:
    preset = POLICIES[wanted.preset]
    given = wanted.model_dump(exclude={"preset"}, exclude_none=True)
    if "memory_survives" in given:
        given["memory_survives"] = tuple(given["memory_survives"])
    return replace(preset, **given)


def _mix(spec: SimulateSpec) -> Mix:
    mix = MIXES[spec.failures.preset]
    if spec.failures.causes is not None:
        rows = [Cause(**{**row.model_dump(), "nodes": row.nodes or 0}) for row in spec.failures.causes]
        mix = replace(mix, causes=tuple(rows))
    if spec.failures.mtbf_card_hours is not None:
        mix = replace(mix, card_hours=spec.failures.mtbf_card_hours)
    return mix


def _tiers(policy: Policy, causes: tuple[Cause, ...], step_s: float, mtbf_s: float) -> Tiers:
    survived = sum(cause.count for cause in causes if policy.memory and cause.kind in policy.memory_survives)
    lost = 1 - survived / sum(cause.count for cause in causes)
    storage_s = policy.storage_every_s
    if storage_s == "auto":
        best = young(policy.storage_block_s, mtbf_s / lost) if lost > 0 else math.inf
        storage_s = min(max(2 * policy.storage_write_s, best, step_s), 86_400.0)
    if policy.storage_write_s > storage_s:
        raise InputError(
            f"storage_every_s is {storage_s:g}, shorter than writing takes ({policy.storage_write_s:g})",
            where=f"policy {policy.name}",
            fix="raise storage_every_s or lower storage_write_s",
        )
    if not policy.memory:
        return Tiers(False, storage_s, 0.0, 1, policy.storage_block_s, policy.storage_write_s)
    memory_s = policy.memory_every_s
    if memory_s == "auto":
        memory_s = min(max(young(policy.memory_block_s, mtbf_s), step_s), MEMORY_LONGEST_S, storage_s)
    if policy.storage_every_s == "auto":
        storage_s = max(storage_s, memory_s)
    if memory_s > storage_s:
        raise InputError(
            f"memory_every_s is {memory_s:g}, longer than storage_every_s ({storage_s:g})",
            where=f"policy {policy.name}",
            fix="lower memory_every_s, or set memory: false",
        )
    per = max(1, round(storage_s / memory_s))
    return Tiers(True, memory_s, policy.memory_block_s, per, policy.storage_block_s, policy.storage_write_s)

"""`kind: simulate`: cards, how they fail and come back, and what each policy does about it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tigerbot.spec.parts import Count, Job, Name, Part, Real, Unit

Seconds = Annotated[Real, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0, allow_inf_nan=False)]
Nodes = Annotated[int, Field(ge=0, le=100_000)]
FaultKind = Literal["process", "hang", "node", "island", "corruption"]


class CauseSpec(Part):
    """A cause of interruptions: how often beside the others, what it hits, how what it hit comes back.

    `nodes` is how many nodes an event of kind island takes (all of the island when absent); `soft` the share that a
    restart of the processes cures, so that no node has to go. `detect_s` and `recover_s` (up to the restore) take the
    place of the policy's.
    """

    name: Name
    count: Positive
    kind: FaultKind = "node"
    nodes: Count | None = None
    soft: Unit = 0.0
    repair: Literal["reboot", "hardware"] = "hardware"
    detect_s: Seconds | None = None
    recover_s: Seconds | None = None


class FailureSpec(Part):
    """How often a card interrupts its job, and why. `weibull_shape` below 1 is infant mortality of the whole fleet."""

    preset: Literal["llama3", "meta-rsc"] = "llama3"
    mtbf_card_hours: Positive | None = None
    causes: Annotated[list[CauseSpec], Field(min_length=1)] | None = None
    weibull_shape: Annotated[Real, Field(ge=0.3, le=3)] = 1.0
    soft_share: Unit = 0.0
    hang_share: Unit = 0.0
    spares_fail: Unit = 1.0
    during_recovery: bool = True


class RepairSpec(Part):
    """Log-normal repair times: the median, and sigma of the logarithm."""

    reboot_median_s: Positive = 900.0
    reboot_sigma: Seconds = 0.2
    hardware_median_s: Positive = 228_600.0
    hardware_sigma: Seconds = 0.59


class PlannedSpec(Part):
    """Planned interruptions of the whole job: how many a day, and how long the job is down before it restores."""

    per_day: Seconds = 0.87
    pause_s: Seconds = 300.0


class HumanSpec(Part):
    """The share of interruptions that need a person, and how long until that person has acted (log-normal)."""

    probability: Unit = 0.0064
    median_s: Positive = 7200.0
    sigma: Seconds = 0.5


class StragglerSpec(Part):
    """Nodes that become slow: how often, and how fast the whole job still is."""

    per_node_day: Seconds = 5.6e-5
    speed: Annotated[Real, Field(gt=0, le=1)] = 0.9


class PolicySpec(Part):
    """What a job does about failures: a preset, and whatever differs from it. Times in seconds."""

    preset: Literal["ours", "ray-train", "dlrover"] = "ours"
    name: Name | None = None
    standbys: Nodes | None = None
    elastic: bool | None = None
    memory: bool | None = None
    memory_every_s: Positive | Literal["auto"] | None = None
    memory_block_s: Seconds | None = None
    memory_restore_s: Seconds | None = None
    memory_survives: list[FaultKind] | None = None
    storage_every_s: Positive | Literal["auto"] | None = None
    storage_block_s: Seconds | None = None
    storage_write_s: Seconds | None = None
    storage_restore_s: Seconds | None = None
    detect_process_s: Seconds | None = None
    detect_hang_s: Seconds | None = None
    detect_node_s: Seconds | None = None
    detect_island_s: Seconds | None = None
    detect_corruption_s: Seconds | None = None
    takeover_s: Seconds | None = None
    restart_s: Seconds | None = None
    swap_warm_s: Seconds | None = None
    swap_cold_s: Seconds | None = None
    shrink_s: Seconds | None = None
    grow_s: Seconds | None = None
    straggler_notice_s: Positive | None = None


class BuySpec(Part):
    """`What should I buy`: the values to try, each combination simulated for every policy of the spec."""

    cards: Annotated[list[Count], Field(min_length=1)] = [1024, 4096, 16384]
    spares_percent: Annotated[list[Annotated[Real, Field(ge=0, le=100)]], Field(min_length=1)] = [0.0, 1.0, 2.0, 4.0]
    standbys: Annotated[list[Nodes], Field(min_length=1)] = [0, 2, 8]
    memory_every_s: Annotated[list[Positive], Field(min_length=1)] = [10.0, 60.0, 300.0]


class SimulateSpec(Job):
    """Predict the goodput of a long training run: cards in nodes and islands, failures, spares, policies.

    `spares` are nodes bought beyond the job, of which a policy keeps its `standbys` warm. `throughput` gives the
    job's relative speed at some numbers of cards, linear in between; without it, speed goes with the cards.
    """

    kind: Literal["simulate"]
    cards: Annotated[Count, Field(le=1_000_000)]
    min_cards: Count | None = None
    size_step_nodes: Count = 1
    cards_per_node: Annotated[Count, Field(le=1024)] = 8
    nodes_per_island: Annotated[Count, Field(le=10_000)] = 2
    spares: Nodes = 2
    days: Annotated[Positive, Field(le=3650)] = 90.0
    step_s: Positive = 10.0
    throughput: list[tuple[Count, Annotated[Real, Field(gt=0)]]] = []
    failures: FailureSpec = FailureSpec()
    repair: RepairSpec = RepairSpec()
    planned: PlannedSpec = PlannedSpec()
    human: HumanSpec = HumanSpec()
    straggler: StragglerSpec = StragglerSpec()
    restore_fails: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    policies: Annotated[list[PolicySpec], Field(min_length=1)] = [
        PolicySpec(preset="ours"),
        PolicySpec(preset="dlrover"),
        PolicySpec(preset="ray-train"),
    ]
    price_per_card_hour: Seconds = 2.5
    replicas: Annotated[Count, Field(ge=2, le=100_000)] = 400
    seed: Annotated[int, Field(ge=0)] = 1
    buy: BuySpec | None = None

    @model_validator(mode="after")
    def _sizes(self) -> SimulateSpec:
        if self.cards % self.cards_per_node:
            raise ValueError(f"cards wants a multiple of cards_per_node ({self.cards_per_node}); got {self.cards}")
        if self.min_cards is not None and self.min_cards > self.cards:
            raise ValueError(f"min_cards wants at most cards ({self.cards}); got {self.min_cards}")
        return self

"""One line of time on which every second of a training run belongs to exactly one thing.

Time here is seconds since the run's first event. Two layers lie on it: what the run was waiting for, which the ledger's
events say, and above that the turns of the training loop, whose lengths rank 0 measured. A turn covers what it lies on.
`replay.py` makes the line out of events; this module is what it is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

CATEGORIES = (
    "queue", "start", "restore", "step", "recompute", "data_wait", "checkpoint_block", "hang_wait", "eval", "resize",
    "idle_after_failure", "other",
)  # fmt: skip
STOPPING = ("process", "hang", "node", "partition", "exception")  # faults after which no step can be finished


@dataclass(slots=True)
class Turn:
    """One turn of the training loop, placed on the line. `*_s` are as rank 0 measured them."""

    start: float
    end: float
    life: int
    generation: int
    world_size: int
    step: int
    total_s: float
    data_s: float
    snapshot_s: float
    checkpoint_s: float
    eval_s: float
    tokens: int
    hang_s: float = 0.0
    undone: bool = False

    @property
    def computing_s(self) -> float:
        rest = self.data_s + self.snapshot_s + self.checkpoint_s + self.eval_s + self.hang_s
        return max(0.0, self.total_s - rest)

    def shares(self) -> list[tuple[str, float]]:
        """How its length divides among categories."""
        scale = (self.end - self.start) / self.total_s if self.total_s else 0.0
        hang = self.hang_s * scale
        if self.undone:
            return [("recompute", self.end - self.start - hang), ("hang_wait", hang)]
        data, evaluation = self.data_s * scale, self.eval_s * scale
        block = (self.snapshot_s + self.checkpoint_s) * scale
        step = max(0.0, self.end - self.start - data - evaluation - block - hang)
        parts = (("data_wait", data), ("step", step), ("hang_wait", hang), ("eval", evaluation))
        return [part for part in (*parts, ("checkpoint_block", block)) if part[1] > 0]


@dataclass(frozen=True)
class Span:
    """A part of the line. `shares` are seconds by category and sum to its length."""

    start: float
    end: float
    shares: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Fault:
    """What a detector saw, and when."""

    kind: str
    at: float
    worker: str = ""
    rank: int = -1
    node: str = ""
    evidence: str = ""


@dataclass(eq=False)
class Incident:
    """From a fault to the first new step. Faults seen before that step belong to the same incident.

    Attributes:
        down_from: when training could not go on any more; None while it still can (a fault that was only noted).
        first_step_start: where the first new step begins, `first_step_at` where it ends.
    """

    faults: list[Fault]
    seen_at: float
    key: tuple[int, int]  # life and generation it happened to
    down_from: float | None = None
    last_step_at: float | None = None
    acted_at: float | None = None
    actions: list[str] = field(default_factory=list)
    generation_at: float | None = None
    formed_at: float | None = None
    restored_at: float | None = None
    tier: str = ""
    first_step_start: float | None = None
    first_step_at: float | None = None
    undone: list[Turn] = field(default_factory=list)

    def as_of(self, last_step_at: float | None) -> Incident:
        """A copy that does not change when the run goes on; the last step so far is that of an open one."""
        last = last_step_at if self.first_step_at is None and self.down_from is not None else self.last_step_at
        own = {"faults": [*self.faults], "actions": [*self.actions], "undone": [*self.undone]}
        return replace(self, last_step_at=last, **own)

    @property
    def kind(self) -> str:
        return "+".join(dict.fromkeys(fault.kind for fault in self.faults))

    @property
    def mttd_s(self) -> float | None:
        """Last finished step to the moment it was seen: an upper bound of the time to detect. None where steps went on."""
        if self.last_step_at is None or self.faults[0].kind not in STOPPING:
            return None
        return max(0.0, self.seen_at - self.last_step_at)

    @property
    def mttr_s(self) -> float | None:
        """Time to the first new step since the fault was seen, or since training was stopped because of it."""
        if self.first_step_at is None or self.down_from is None:
            return None
        return max(0.0, self.first_step_at - self.down_from)


@dataclass(frozen=True)
class Life:
    """One life of the driver: where it lies on the line, and what it held meanwhile."""

    driver: str
    start: float
    end: float
    began: float  # wall clock
    stopped: str  # done, failed, killed; nothing when it was killed or still lives
    name: str
    cards: int
    price_per_card_hour: float | None


@dataclass(frozen=True)
class Persisted:
    """A state that reached storage, and how long the way took."""

    at: float
    seconds: float
    size_bytes: int


@dataclass(frozen=True)
class Timeline:
    """The whole line. `waits` and `turns` are its two layers, each in order and without overlap.

    Attributes:
        resizes: the pauses for growing, which nothing forced.
        missing_lines: events that could not be written.
    """

    waits: list[tuple[float, float, str]]
    turns: list[Turn]
    incidents: list[Incident]
    resizes: list[Incident]
    lives: list[Life]
    persisted: list[Persisted]
    missing_lines: int

    @property
    def end(self) -> float:
        return self.lives[-1].end if self.lives else 0.0

    def spans(self) -> Iterator[Span]:
        """Both layers as one, from 0 to `end` without a hole."""
        index = 0
        for start, end, category in self.waits:
            at = start
            while index < len(self.turns) and self.turns[index].start < end:
                turn = self.turns[index]
                if turn.start > at:
                    yield Span(at, turn.start, ((category, turn.start - at),))
                if turn.start >= start:
                    yield Span(turn.start, turn.end, turn.shares())
                at = max(at, turn.end)
                if turn.end > end:
                    break  # it reaches into the next wait, which begins by skipping it
                index += 1
            if at < end:
                yield Span(at, end, ((category, end - at),))

"""What the loop asks of others: where a state is kept, and who is told what a rank does. Contracts only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from tigerbot_jobs.train.engine import (
    Engine,
)
from tigerbot_jobs.train.metrics import Row


@dataclass(frozen=True)
class Progress:
    """What a state knows beside the weights.

    `voided` steps were taken back and count without an update. `rows` are the last ones logged: whoever was to hand them
    on may have died with the steps they tell of.
    """

    step: int
    voided: tuple[int, ...] = ()
    guard: dict[str, Any] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    def as_extra(self) -> dict[str, Any]:
        return {"voided": list(self.voided), "guard": self.guard, "rows": list(self.rows)}

    @classmethod
    def of(cls, step: int, extra: dict[str, Any]) -> Progress:
        return cls(step, tuple(extra.get("voided", ())), dict(extra.get("guard", {})), tuple(extra.get("rows", ())))


class Keep(Protocol):
    """Where a rank's state goes and comes from. Methods marked collective are called by every rank."""

    def restore(self, engine: Engine) -> Progress:
        """Collective. Put back what there is; step 0 where there is nothing."""
        ...

    def due(self, step: int) -> bool:
        """On rank 0: whether the state after `step` goes into memory."""
        ...

    def save_due(self, step: int) -> bool:
        """On rank 0: whether the state after `step` goes into storage."""
        ...

    def snapshot(self, engine: Engine, progress: Progress, *, save: bool) -> None:
        """Collective. Keep the state in memory, and with `save` in storage too."""
        ...

    def rewind(self, engine: Engine, at_most: int) -> Progress | None:
        """Collective. Back to a state in memory of at most this step; None where there is none."""
        ...


class Told(Protocol):
    """Who is told what a rank does."""

    def phase(self, phase: str, step: int) -> None: ...

    def step_done(self, row: list[float], own_s: float) -> None: ...

    def log(self, row: Row) -> None: ...

    def say(self, kind: str, **about: Any) -> None: ...

    def paused(self) -> bool:
        """Whether the rank is to leave at the next step boundary."""
        ...

    def after_step(self) -> None:
        """At a step boundary: time for what somebody asked for."""
        ...

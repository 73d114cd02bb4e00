"""Losses and gradients that are not numbers, and losses that run away: skip, roll back, go slower, stop.

Every rank asks with the same all-reduced numbers and so decides the same without another message. A spike is data and
state together (PaLM, 2204.02311, 5.1): going back without skipping the batches meets it again, skipping without going
back keeps the damage. What the loss did before, in the last 200 sound steps, is what it may do; a single outlier, a
falling loss and a mixture of easy and hard batches are no spikes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from tigerbot_jobs.train.watch.skips import SkipList

WINDOW_STEPS = 200
IN_A_ROW = 3
_MADS = 6.0
_NORMS = 5.0
_LEAST_MAD = 0.01  # of the median: a loss that hardly moves is not a reason to call a ripple a spike
_BEYOND = 1.5  # times as far from the median as the 98th percentile: what a mixture shows regularly is no spike
_LEAD = 1  # the batch before the first that shows it has made the step that did it
_BUDGET_STEPS = 10_000  # rollbacks are counted over so many


@dataclass(frozen=True)
class Keep:
    """Apply the step."""

    evidence: str = ""


@dataclass(frozen=True)
class Skip:
    """Do not apply this step; counters and data go on."""

    step: int
    evidence: str


@dataclass(frozen=True)
class Rollback:
    """Go back to a state of at most `to` steps, and never take the global batches `skip` again.

    Args:
        lr_factor: of the learning rate for some steps, below 1 when it happened here before.
    """

    to: int
    skip: tuple[int, int]
    lr_factor: float
    evidence: str


@dataclass(frozen=True)
class Stop:
    """Going back does not help."""

    evidence: str


Verdict = Keep | Skip | Rollback | Stop


@dataclass(frozen=True)
class Sound:
    """A step that was as it should be."""

    step: int
    loss: float
    norm: float


class LossGuard:
    """Decides about a step before it is applied.

    Args:
        warmup_steps: no spike is called before so many sound steps are known.
        margin_steps: how far before the first bad step a rollback goes.
        same_place: another one within so many steps after an earlier one is the same again.
        max_rollbacks: in 10,000 steps; the next is a stop.
        slow_factor, slow_steps: of the learning rate, when it happens again at the same place.
    """

    def __init__(
        self,
        *,
        warmup_steps: int = 100,
        margin_steps: int = 100,
        same_place: int = 200,
        max_rollbacks: int = 5,
        slow_factor: float = 0.5,
        slow_steps: int = 200,
    ) -> None:
        self._warmup_steps, self._margin_steps, self._same_place = warmup_steps, margin_steps, same_place
        self._max_rollbacks, self._slow_factor, self._slow_steps = max_rollbacks, slow_factor, slow_steps
        self._sound: list[Sound] = []
        self._bad: list[int] = []  # steps that were not sound, with no sound one between or after
        self._rollbacks: list[tuple[int, int]] = []  # (first bad step, last)
        self._slow: tuple[int, int] = (0, 0)
        self.skips = SkipList()

    def decide(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """What to do with step `step` (from 0), from the loss and gradient norm of the whole global batch."""
        self._forget_from(step)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        reason = self._why_a_spike(loss, grad_norm) if finite else f"loss {loss:g}, gradient norm {grad_norm:g}"
        if not reason:
            if self._bad and step >= self._bad[-1]:  # a step done again on the way there ends no row
                self._bad = []
            self._sound = [*self._sound[1 - WINDOW_STEPS :], Sound(step, loss, grad_norm)]
            return Keep()
        self._bad = [*(at for at in self._bad if at < step), step]
        if len(self._bad) >= IN_A_ROW:
            return self._go_back(step, reason)
        return Keep(f"step {step}: {reason}") if finite else Skip(step, f"step {step} is not applied: {reason}")

    def lr_factor(self, step: int) -> float:
        """What the learning rate of a step is multiplied with."""
        begin, end = self._slow
        return self._slow_factor if begin <= step < end else 1.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "sound": [[one.step, one.loss, one.norm] for one in self._sound],
            "bad": self._bad,
            "rollbacks": [list(one) for one in self._rollbacks],
            "slow": list(self._slow),
            "skips": self.skips.to_json(),
        }

    def restore(self, state: Mapping[str, Any], *, step: int) -> None:
        """Take a state over, to go on with step `step`; a state from after it loses what came later.

        After a rollback the state that decided it is the one to restore (`newest`), not the older checkpoint's own:
        that one does not know what is skipped.
        """
        self._sound = [Sound(int(at), loss, norm) for at, loss, norm in state["sound"]]
        self._bad = [int(at) for at in state["bad"]]
        self._rollbacks = [(int(first), int(last)) for first, last in state["rollbacks"]]
        self._slow = (int(state["slow"][0]), int(state["slow"][1]))
        self.skips = SkipList.from_json(state["skips"])
        self._forget_from(step)

    def _forget_from(self, step: int) -> None:
        """What a return to an earlier step has made undone was never seen."""
        if self._sound and self._sound[-1].step >= step:
            self._sound = [one for one in self._sound if one.step < step]

    def _why_a_spike(self, loss: float, norm: float) -> str:
        if len(self._sound) < self._warmup_steps:
            return ""
        losses, norms = [one.loss for one in self._sound], [one.norm for one in self._sound]
        high_loss, high_norm = _high(losses), _high(norms)
        if loss <= high_loss and norm <= high_norm:
            return ""  # nearly always, and cheap
        middle, usual_norm = median(losses), median(norms)
        spread = max(median(abs(value - middle) for value in losses), _LEAST_MAD * abs(middle))
        loss_limit = max(middle + _MADS * spread, middle + _BEYOND * (high_loss - middle))
        norm_limit = max(_NORMS * usual_norm, usual_norm + _BEYOND * (high_norm - usual_norm))
        said = []
        if loss > loss_limit:
            said.append(f"loss {loss:.4g} where {middle:.4g} is usual and {loss_limit:.4g} the limit")
        if norm > norm_limit > 0:
            said.append(f"gradient norm {norm:.4g} where {usual_norm:.4g} is usual and {norm_limit:.4g} the limit")
        return ", ".join(said)

    def _go_back(self, step: int, reason: str) -> Rollback | Stop:
        first = self._bad[0]
        here = [
            (begin, end)
            for begin, end in self._rollbacks
            if begin - self._margin_steps <= first <= end + self._same_place
        ]
        recent = [begin for begin, _ in self._rollbacks if begin > first - _BUDGET_STEPS]
        what = f"{len(self._bad)} bad steps in a row, {first} to {step}: {reason}"
        if len(here) >= 2:
            return Stop(
                f"{what}; this place was gone back from twice, the second time at {self._slow_factor:g} of the learning rate:"
                " lower train.lr or look at the data there"
            )
        if len(recent) >= self._max_rollbacks:
            return Stop(f"{what}; {len(recent)} rollbacks in {_BUDGET_STEPS} steps are enough: lower train.lr")
        skip = (self.skips.data_index(max(0, first - _LEAD)), self.skips.data_index(step))
        to = max(0, first - self._margin_steps)
        factor = self._slow_factor if here else 1.0
        if here:
            self._slow = (to, step + self._slow_steps)
        self.skips = self.skips.add(*skip)
        self._rollbacks.append((first, step))
        self._bad = []
        text = f"{what}; back to step {to} or before, global batches {skip[0]} to {skip[1]} are skipped"
        slower = f", at {factor:g} of the learning rate until step {self._slow[1]}" if here else ""
        return Rollback(to, skip, factor, text + slower)


def newest(states: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of several kept states (a checkpoint's, the driver's) the one that knows the most rollbacks, then steps."""
    return max(states, key=lambda state: (len(state["rollbacks"]), state["sound"][-1][0] if state["sound"] else -1))


def _high(values: list[float]) -> float:
    """The 98th percentile, nearest rank."""
    return sorted(values)[math.ceil(0.98 * len(values)) - 1]

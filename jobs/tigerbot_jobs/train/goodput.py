"""Where the time of a training run went, and what it cost: pure functions over the events of its ledger.

Goodput is the time in optimizer steps that are part of the final history, over wall time since the run was submitted.
Throughput goodput is the tokens of that history over those possible at the best sustained rate, so that a run on fewer
workers is not at 100%. Times to detect and to recover are percentiles: a mean hides the night somebody had to get up.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from tigerbot_jobs.train.ledger import Event, Tail
from tigerbot_jobs.train.replay import Replay, timeline
from tigerbot_jobs.train.timeline import CATEGORIES, Incident, Life, Span, Timeline, Turn

_MEASURABLE_S = 1e-6  # less has no rate
_SUSTAINED_TURNS, _SUSTAINED_S = 20, 5.0  # a rate held for less is luck


@dataclass(frozen=True)
class Loss:
    """An incident with the seconds that it took: the gap it tore, and the turns that it made undone."""

    incident: Incident
    seconds: dict[str, float]

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Account:
    """A run's time, seconds by category and by incident.

    Attributes:
        ended: done, failed or killed (by a person or a signal); empty while it runs or when its driver was killed.
        began: wall clock of the first event.
        seconds: by category, all of them; they sum to `wall_s`.
        losses: incidents, in order. `resizes` are the pauses for growing, which no fault caused.
        steps: optimizer steps that are part of the history, and `tokens` in them; `undone_steps` were done in vain.
        stopped_s: of the idle time, what lies between a stop and the next start; nobody pays for cards then.
        card_hours: cards held, warm standbys among them, times hours.
        missing_lines: events that could not be written, because a disk was full for instance.
    """

    name: str
    ended: str
    began: float
    wall_s: float
    seconds: dict[str, float]
    losses: tuple[Loss, ...]
    resizes: tuple[Loss, ...]
    steps: int
    tokens: int
    undone_steps: int
    best_tokens_per_s: float
    lives: int
    stopped_s: float
    card_hours: float
    price_per_card_hour: float | None
    persisted_bytes: int
    persists: int
    missing_lines: int
    timeline: Timeline = field(repr=False)

    @property
    def goodput(self) -> float:
        return self.seconds["step"] / self.wall_s if self.wall_s else 0.0

    @property
    def goodput_throughput(self) -> float:
        possible = self.best_tokens_per_s * self.wall_s
        return min(1.0, self.tokens / possible) if possible else 0.0

    @property
    def cost(self) -> float | None:
        return None if self.price_per_card_hour is None else self.card_hours * self.price_per_card_hour

    @property
    def mttr_s(self) -> list[float]:
        """Time to recover of every incident that training came back from."""
        return [loss.incident.mttr_s for loss in self.losses if loss.incident.mttr_s is not None]

    @property
    def mttd_s(self) -> list[float]:
        """Last finished step to the fault's being seen, of every incident that stopped training."""
        return [loss.incident.mttd_s for loss in self.losses if loss.incident.mttd_s is not None]


def account(events: Sequence[Event], until: float | None = None, price_per_card_hour: float | None = None) -> Account:
    """Account for every second of a run.

    Args:
        events: of `read_events`.
        until: for a run that lives: the wall clock now. The time since its last event is `other`, nobody knows yet.
        price_per_card_hour: instead of the one in the ledger.
    """
    return _account(timeline(events, until), price_per_card_hour)


class LiveAccount:
    """The account of a ledger that grows. Each call reads what is new; one caller at a time."""

    def __init__(self, path: str | Path) -> None:
        self._tail, self._replay = Tail(path), Replay()

    def now(self, until: float | None = None) -> Account:
        """As `account` of all events up to now."""
        for event in self._tail.read():
            self._replay.take(event)
        return _account(self._replay.timeline(until), None)


def as_metrics(account: Account) -> dict[str, float]:
    """The account as metrics of a tracked run. Percentiles are there once there is something to take them of."""
    metrics = {
        "goodput": account.goodput,
        "goodput_throughput": account.goodput_throughput,
        "wall_s": account.wall_s,
        "useful_step_s": account.seconds["step"],
        "useful_steps": float(account.steps),
        "useful_tokens": float(account.tokens),
        "undone_steps": float(account.undone_steps),
        "incidents": float(len(account.losses)),
        "card_hours": account.card_hours,
        "persisted_bytes": float(account.persisted_bytes),
    }
    metrics |= {f"lost_s_{name}": seconds for name, seconds in account.seconds.items() if name != "step"}
    for name, values in (("mttr", account.mttr_s), ("mttd", account.mttd_s)):
        if values:
            metrics |= {f"{name}_p{q}_s": percentile(values, q) for q in (50, 90, 99)}
    if account.cost is not None:
        metrics["cost"] = account.cost
    return metrics


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, between the two nearest values where it falls between them."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _account(line: Timeline, price_per_card_hour: float | None) -> Account:
    spans = list(line.spans())
    seconds: dict[str, float] = dict.fromkeys(CATEGORIES, 0.0)
    for span in spans:
        for category, length in span.shares:
            seconds[category] += length
    useful = [turn for turn in line.turns if not turn.undone]
    last = line.lives[-1] if line.lives else None
    price = price_per_card_hour if price_per_card_hour is not None else (last.price_per_card_hour if last else None)
    losses = _losses(spans, line.incidents, line.end)
    return Account(
        name=next((life.name for life in reversed(line.lives) if life.name), ""),
        ended=last.stopped if last else "",
        began=line.lives[0].began if line.lives else 0.0,
        wall_s=line.end,
        seconds=seconds,
        losses=losses,
        resizes=_losses(spans, line.resizes, line.end),
        steps=len(useful),
        tokens=sum(turn.tokens for turn in useful),
        undone_steps=len(line.turns) - len(useful),
        best_tokens_per_s=_best_rate(line.turns),
        lives=len(line.lives),
        stopped_s=sum(later.start - life.end for life, later in _pairs(line) if life.stopped),
        card_hours=_card_seconds(line) / 3600,
        price_per_card_hour=price,
        persisted_bytes=sum(state.size_bytes for state in line.persisted),
        persists=len(line.persisted),
        missing_lines=line.missing_lines,
        timeline=line,
    )


def _losses(spans: list[Span], incidents: Iterable[Incident], end: float) -> tuple[Loss, ...]:
    starts = [span.start for span in spans]
    return tuple(Loss(incident, _lost(spans, starts, incident, end)) for incident in incidents)


def _lost(spans: list[Span], starts: list[float], incident: Incident, end: float) -> dict[str, float]:
    """Seconds by category between the last step before it and the first one after it, and those of its undone turns."""
    seconds: Counter[str] = Counter()
    if incident.down_from is not None:
        after = incident.first_step_start if incident.first_step_start is not None else end
        before = min(after, incident.down_from if incident.last_step_at is None else incident.last_step_at)
        first = max(0, bisect.bisect_right(starts, before) - 1)
        for span in spans[first : bisect.bisect_left(starts, after)]:
            inside = min(after, span.end) - max(before, span.start)
            if inside > 0:
                seconds.update({name: length * inside / (span.end - span.start) for name, length in span.shares})
        seconds.pop("step", None)
        seconds.pop("recompute", None)
    for turn in incident.undone:
        seconds.update(dict(turn.shares()))
    return {name: seconds[name] for name in CATEGORIES if seconds[name] > 0}


def _best_rate(turns: Sequence[Turn]) -> float:
    """Tokens a second of computing, at the best stretch long enough to mean something; else over all there is."""
    best, first, tokens, seconds = 0.0, 0, 0, 0.0
    for last, turn in enumerate(turns):
        if (turn.life, turn.generation) != (turns[first].life, turns[first].generation):
            first, tokens, seconds = last, 0, 0.0
        tokens, seconds = tokens + turn.tokens, seconds + turn.computing_s
        while last - first >= _SUSTAINED_TURNS and seconds - turns[first].computing_s >= _SUSTAINED_S:
            tokens, seconds = tokens - turns[first].tokens, seconds - turns[first].computing_s
            first += 1
        if last - first + 1 >= _SUSTAINED_TURNS and seconds >= _SUSTAINED_S:
            best = max(best, tokens / seconds)
    computing = sum(turn.computing_s for turn in turns)
    return best or (sum(turn.tokens for turn in turns) / computing if computing >= _MEASURABLE_S else 0.0)


def _card_seconds(line: Timeline) -> float:
    """A driver that was killed leaves its cards reserved until the next one comes; a run that was stopped gives them back."""
    held = sum((life.end - life.start) * life.cards for life in line.lives)
    return held + sum((later.start - life.end) * life.cards for life, later in _pairs(line) if not life.stopped)


def _pairs(line: Timeline) -> Iterable[tuple[Life, Life]]:
    return pairwise(line.lives)

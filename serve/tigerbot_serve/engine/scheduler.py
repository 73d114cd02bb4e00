"""Who waits, who holds a slot, and whose prompt is read next. Slots go first come, first served.

A ticket holds its slot from admission until its FinishEvent, through judge and rewrites. Prompts are read in three
lanes, each first come, first served: short prompts do not wait behind a long one, and the judge reads with what is
left. This module knows nothing about torch; the engine calls it under its lock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum

from tigerbot.errors import ServeError
from tigerbot_serve.engine.request import FinishReason
from tigerbot_serve.engine.ticket import Ticket
from tigerbot_serve.ensemble.judge import Reading


class QueueFull(ServeError):
    """As many requests wait as may."""


class Lane(IntEnum):
    """Whose turn it is to be read: what fits one chunk, what does not, answers for the judge."""

    SHORT = 0
    LONG = 1
    JUDGE = 2


# Of a step's chunk, where several lanes have work. Nobody starves: a judge that waits holds slots.
_SHARES = {Lane.SHORT: 4, Lane.LONG: 3, Lane.JUDGE: 1}


@dataclass(eq=False)
class Prefill:
    """Token ids to read for a ticket: its prompt, or, with `reading`, prompt and answer for the judge.

    Attributes:
        done: tokens read, of each side.
        begun: the known prefix was looked up.
        counted: tokens that the ticket's usage has.
        twins: tickets of the same prompt that take this reading's states as their own.
    """

    ticket: Ticket
    ids: tuple[int, ...]
    reading: Reading | None = None
    lane: Lane = Lane.SHORT
    done: list[int] = field(default_factory=lambda: [0, 0])
    begun: bool = False
    counted: int = 0
    twins: list[Ticket] = field(default_factory=list)

    def same_as(self, other: Prefill) -> bool:
        """Whether one reading serves both: `n` choices of one prompt, say."""
        mine, theirs = self.ticket, other.ticket
        return (
            self.reading is None
            and other.reading is None
            and self.ids == other.ids
            and mine.current.dial == theirs.current.dial
            and mine.request.tenant == theirs.request.tenant
            and mine.request.prompt_logprobs is theirs.request.prompt_logprobs is None
        )


class Scheduler:
    """`slots` running tickets, at most `max_queue` waiting ones; prompts of up to `chunk` tokens are short."""

    def __init__(self, slots: int, max_queue: int, chunk: int) -> None:
        self.slots, self.max_queue = slots, max_queue
        self._chunk = chunk
        self.waiting: deque[Ticket] = deque()
        self.running: list[Ticket] = []
        self._lanes: dict[Lane, deque[Prefill]] = {lane: deque() for lane in Lane}

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def submit(self, ticket: Ticket) -> None:
        if len(self.waiting) >= self.max_queue:
            raise QueueFull(
                f"{len(self.waiting)} requests wait already", where="engine.max_queue", fix="try again later"
            )
        self.waiting.append(ticket)

    def admit(self) -> list[Ticket]:
        """Give free slots to those who waited longest."""
        admitted = []
        while self.waiting and len(self.running) < self.slots:
            ticket = self.waiting.popleft()
            self.running.append(ticket)
            self.prefill(Prefill(ticket, ticket.current.prompt_ids))
            admitted.append(ticket)
        return admitted

    def prefill(self, work: Prefill) -> None:
        if work.reading is not None:
            work.lane = Lane.JUDGE
        else:
            work.lane = Lane.LONG if len(work.ids) > self._chunk else Lane.SHORT
        self._lanes[work.lane].append(work)

    def shares(self) -> dict[Lane, int]:
        """The lanes that have work, and how many of the step's tokens each may read."""
        busy = [lane for lane in Lane if self._lanes[lane]]
        total = sum(_SHARES[lane] for lane in busy)
        return {lane: max(1, self._chunk * _SHARES[lane] // total) for lane in busy}

    def next_prefill(self, lane: Lane) -> Prefill | None:
        """The text under way in a lane, or its next one. One at a time: it stays first until `prefilled`."""
        return self._lanes[lane][0] if self._lanes[lane] else None

    def prefilled(self, work: Prefill) -> None:
        """It was read, and with it everybody who waits for the same text."""
        lane = self._lanes[work.lane]
        lane.remove(work)
        same = [other for other in lane if other.same_as(work)]
        work.twins = [other.ticket for other in same]
        for other in same:
            lane.remove(other)

    def ending(self) -> list[tuple[Ticket, FinishReason]]:
        """Tickets that end before their text does, and why."""
        tickets = (*self.waiting, *self.running)
        return [(ticket, reason) for ticket in tickets if (reason := ticket.ending()) is not None]

    def release(self, ticket: Ticket) -> None:
        """Forget a ticket wherever it stands; its slot is free."""
        if ticket in self.running:
            self.running.remove(ticket)
            for lane, works in self._lanes.items():
                self._lanes[lane] = deque(work for work in works if work.ticket is not ticket)
        elif ticket in self.waiting:
            self.waiting.remove(ticket)

    def outstanding_tokens(self) -> int:
        return sum(ticket.current.left for ticket in (*self.waiting, *self.running))

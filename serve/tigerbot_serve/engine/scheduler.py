"""Who waits, who holds a slot, and whose prompt is read next. First come, first served.

A ticket holds its slot from admission until its FinishEvent, through judge and rewrites. This module knows nothing
about torch; the engine calls it under its lock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tigerbot.errors import ServeError
from tigerbot_serve.engine.request import FinishReason
from tigerbot_serve.engine.ticket import Ticket
from tigerbot_serve.ensemble.judge import Reading


class QueueFull(ServeError):
    """As many requests wait as may."""


@dataclass
class Prefill:
    """Token ids to read for a ticket: its prompt, or, with `reading`, prompt and answer for the judge."""

    ticket: Ticket
    ids: tuple[int, ...]
    reading: Reading | None = None
    done: int = 0


class Scheduler:
    """`slots` running tickets, at most `max_queue` waiting ones."""

    def __init__(self, slots: int, max_queue: int) -> None:
        self.slots, self.max_queue = slots, max_queue
        self.waiting: deque[Ticket] = deque()
        self.running: list[Ticket] = []
        self._prefills: deque[Prefill] = deque()

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
        self._prefills.append(work)

    def next_prefill(self) -> Prefill | None:
        """The prompt under way, or the next one. One at a time: it stays first until `prefilled`."""
        return self._prefills[0] if self._prefills else None

    def prefilled(self) -> None:
        self._prefills.popleft()

    def ending(self) -> list[tuple[Ticket, FinishReason]]:
        """Tickets that end before their text does, and why."""
        found = [(ticket, ticket.ending()) for ticket in (*self.waiting, *self.running)]
        return [(ticket, reason) for ticket, reason in found if reason is not None]

    def release(self, ticket: Ticket) -> None:
        """Forget a ticket wherever it stands; its slot is free."""
        if ticket in self.running:
            self.running.remove(ticket)
            self._prefills = deque(work for work in self._prefills if work.ticket is not ticket)
        elif ticket in self.waiting:
            self.waiting.remove(ticket)

    def outstanding_tokens(self) -> int:
        return sum(ticket.current.left for ticket in (*self.waiting, *self.running))

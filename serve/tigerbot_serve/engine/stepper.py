"""One step over everything that runs: what the engine's thread does, again and again.

A step is: drop who left or is late, admit who waits, decode one token of every sequence, read on in prompts, deliver.
What fails ends the requests that it was about with an error, and the next step goes on. When memory runs out, what is
kept for later prompts goes first and then the youngest request. This module knows nothing about threads, beyond the
lock under which it touches the scheduler and with which it is woken.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from tigerbot.spec import EngineSpec
from tigerbot_serve.engine.choose import choose
from tigerbot_serve.engine.decoding import Decoding, last
from tigerbot_serve.engine.embedding import Embeddings
from tigerbot_serve.engine.memory import out_of_memory, reason_of
from tigerbot_serve.engine.prefill import Reader, States
from tigerbot_serve.engine.prefix import PrefixCache, public_prefixes
from tigerbot_serve.engine.request import EngineStats, FinishReason
from tigerbot_serve.engine.rows import Rows, plan_of
from tigerbot_serve.engine.scheduler import Lane, Prefill, Scheduler
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.engine.speculate import Taken
from tigerbot_serve.engine.ticket import Ticket
from tigerbot_serve.ensemble.mixture import Mixture
from tigerbot_serve.ensemble.review import Review, Wanted

log = logging.getLogger(__name__)


class Stepper:
    """Tickets on their way from the queue to their last event.

    Args:
        review: says what follows when a text is whole.
        max_length: longest prompt and answer together, in tokens.
        lock: held by whoever touches the scheduler or the embeddings.

    Attributes:
        scheduler, embeddings: what other threads add to, under the lock.
        steps: made so far.
        hungry: requests in a row that found no memory with the engine to themselves; a token ends it.
    """

    def __init__(
        self, mixture: Mixture, review: Review, spec: EngineSpec, max_length: int, lock: threading.Condition
    ) -> None:
        self._mixture, self._members, self._review, self._lock = mixture, mixture.members, review, lock
        self.scheduler = Scheduler(spec.slots, spec.max_queue, spec.prefill_chunk)
        self.embeddings = Embeddings(self._members, spec.prefill_chunk, spec.max_queue)
        self._rows = Rows(self._members, spec.slots, max_length + Decoding.slack(spec))
        self._decoding = Decoding(mixture, spec)
        public = public_prefixes(self._members.tokenizer, spec.public_prefix)
        self._prefix = PrefixCache(self._members.hashes, spec.prefix_cache_bytes, public)
        self._reader = Reader(mixture, self._prefix, max_length)
        self.steps = self.hungry = self._decoded = self._gated = 0

    def step(self) -> None:
        """One round over everything that runs."""
        self._drop_ending()
        self._admit()
        self._look_up()
        self._decode()
        self._prefill()
        self.embeddings.step()
        self._deliver()
        self.steps += 1

    def stats(self) -> EngineStats:
        with self._lock:
            scheduler = self.scheduler
            return EngineStats(
                slots=scheduler.slots,
                slots_used=len(scheduler.running),
                queued=len(scheduler.waiting),
                outstanding_tokens=scheduler.outstanding_tokens(),
                tokens_decoded=self._decoded,
                steps=self.steps,
                prefix_bytes=self._prefix.bytes,
                prefix_tokens_reused=self._prefix.reused,
                tokens_gated=self._gated,
                tokens_drafted=self._decoding.speculation.drafted if self._decoding.speculation else 0,
                drafts_kept=self._decoding.speculation.kept if self._decoding.speculation else 0,
                gate_variation=self._decoding.gate.meter.variation if self._decoding.gate else 0.0,
            )

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do until somebody asks."""
        return self.scheduler.idle and self.embeddings.idle

    def rests(self) -> bool:
        """Whether every running ticket waits for evidence, and nobody comes or goes."""
        scheduler = self.scheduler
        comes = scheduler.waiting and len(scheduler.running) < scheduler.slots
        return (
            self.embeddings.idle
            and not comes
            and bool(scheduler.running)
            and all(ticket.waits for ticket in scheduler.running)
            and not scheduler.ending()
        )

    def broke(self, error: Exception) -> None:
        """A step failed as a whole: end what runs, and begin with empty rows."""
        if out_of_memory(error):
            self._prefix.clear()
        self.fail(line_of(error), reason_of(error))

    def fail(self, error: str, reason: FinishReason = "error", *, waiting: bool = False) -> None:
        """End every running request (and the waiting ones) with an error, and begin with empty rows."""
        with self._lock:
            tickets = [*self.scheduler.running, *(self.scheduler.waiting if waiting else ())]
        self._rows.clear()  # first: what is broken may not be worth moving
        for ticket in tickets:
            self._finish(ticket, reason, error)

    def _drop_ending(self) -> None:
        with self._lock:
            ending = self.scheduler.ending()
        for ticket, reason in ending:
            self._finish(ticket, reason)

    def _admit(self) -> None:
        with self._lock:
            admitted = self.scheduler.admit()
        for ticket in admitted:
            ticket.phase("draft")

    def _look_up(self) -> None:
        """Tickets whose plug-ins have answered go on."""
        for ticket in list(self.scheduler.running):
            if ticket.looking_up and not ticket.waits:
                self._follow(ticket, self._review.looked_up, ticket)

    def _decode(self) -> None:
        """A token for every sequence; what fails here is about all of them, unless there was no memory for so many."""
        sequences = list(self._rows.sequences)
        if not sequences:
            return
        before = sum(len(sequence.output_ids) for sequence in sequences)
        try:
            self._give(self._decoding.step(self._rows))
        except Exception as error:
            log.exception("decoding failed")
            taken = sum(len(sequence.output_ids) for sequence in sequences) - before
            spared = out_of_memory(error) and not taken
            if spared and self._prefix.bytes:
                self._prefix.clear()
                return
            tickets = [ticket for ticket in self.scheduler.running if ticket.current in sequences]
            for ticket in tickets[-1:] if spared else tickets:
                self._give_up(ticket, error)
        for ticket in self.scheduler.running[::-1]:  # the outermost rows first: no row moves to be removed itself
            if ticket.current.finish_reason is not None and ticket.current in self._rows.sequences:
                self._gated += ticket.current.skipped
                self._rows.keep(ticket.current, self._prefix)
                self._rows.remove(ticket.current)
                self._attempt_ended(ticket)

    def _prefill(self) -> None:
        """Read on in the prompts, `prefill_chunk` tokens a step, so that a long one does not freeze the others."""
        left = 0
        for lane, share in self.scheduler.shares().items():
            left = self._read_lane(lane, left + share)

    def _read_lane(self, lane: Lane, budget: int) -> int:
        """Read in one lane; gives what is left of the budget."""
        while budget > 0 and (work := self.scheduler.next_prefill(lane)) is not None:
            try:
                budget -= self._read_on(work, budget)
            except Exception as error:
                log.exception("a prefill failed")
                if out_of_memory(error) and self._prefix.bytes and self._may_read_again(lane, work):
                    self._prefix.clear()
                    return 0
                for ticket in (work.ticket, *work.twins):
                    if ticket in self.scheduler.running:
                        self._give_up(ticket, error)
        return budget

    def _may_read_again(self, lane: Lane, work: Prefill) -> bool:
        """Whether a failed chunk left no trace: the text is still first and its end was not reached."""
        return self.scheduler.next_prefill(lane) is work and work.reading is None and not self._reader.whole(work)

    def _read_on(self, work: Prefill, budget: int) -> int:
        read, states = self._reader.read(work, budget)
        if self._reader.whole(work):
            self.scheduler.prefilled(work)
            if work.reading is not None:
                self._judged(work)
            else:
                self._first_tokens(work, (last(states[0]), last(states[1])))
        return read

    def _first_tokens(self, work: Prefill, states: States) -> None:
        """Everybody whose prompt this was draws from the same states."""
        tickets = [work.ticket, *work.twins]
        for ticket in work.twins:
            ticket.current.prefilled = ticket.current.cached = len(work.ids)
        work.ticket.prompt_read()
        if not work.ticket.current.max_tokens:  # only the prompt's own log-probabilities are wanted
            work.ticket.current.finish_reason = "length"
            self._attempt_ended(work.ticket)
            return
        sequences = [ticket.current for ticket in tickets]
        rows = [[None if state is None else 0] * len(tickets) for state in states]
        plan = plan_of(sequences, (rows[0], rows[1]), self._members.device)
        self._give(list(zip(sequences, choose(self._mixture, sequences, plan, *states), strict=True)))
        for ticket, sequence in zip(tickets, sequences, strict=True):
            if sequence.finish_reason is None:
                self._rows.add(sequence, self._reader.scratch(work))
            else:
                self._attempt_ended(ticket)

    def _give(self, taken: Taken) -> None:
        """Tokens were taken; requests that are not held give them out."""
        tickets = {id(ticket.current): ticket for ticket in self.scheduler.running}
        for sequence, event in taken:
            tickets[id(sequence)].token(event)
        self._decoded, self.hungry = self._decoded + len(taken), 0

    def _attempt_ended(self, ticket: Ticket) -> None:
        """A text is whole: give it, or have it judged."""
        self._follow(ticket, self._review.ended, ticket)

    def _judged(self, work: Prefill) -> None:
        self._follow(work.ticket, self._review.judged, work.ticket, work.reading)

    def _follow(self, ticket: Ticket, ask: Callable[..., Wanted], *given: Any) -> None:
        """Do what the review wants next for a ticket; a review that fails costs the verdict."""
        try:
            wanted = ask(*given)
        except Exception:
            log.exception("the review failed")
            self._review.settle(ticket)
            wanted = None
        if isinstance(wanted, Sequence):
            ticket.attempts.append(wanted)
            self.scheduler.prefill(Prefill(ticket, wanted.prompt_ids))
        elif wanted is not None:
            self.scheduler.prefill(Prefill(ticket, wanted.ids, wanted))
        elif not ticket.looking_up:
            self._finish(ticket, ticket.kept.finish_reason or "stop")

    def _give_up(self, ticket: Ticket, error: Exception) -> None:
        """Work for a ticket failed: a held answer that is whole is given unverified, another ends with an error."""
        if ticket.request.verify and ticket.kept.finish_reason is not None:
            self._review.settle(ticket)
            self._finish(ticket, ticket.kept.finish_reason)
        else:
            self._finish(ticket, reason_of(error), line_of(error))

    def _finish(self, ticket: Ticket, reason: FinishReason, error: str = "") -> None:
        self.hungry += reason == "memory" and self.scheduler.running == [ticket]
        self._rows.remove(ticket.current)
        with self._lock:
            self.scheduler.release(ticket)
        ticket.finish(reason, error)
        ticket.flush()

    def _deliver(self) -> None:
        for ticket in self.scheduler.running:
            ticket.flush()


def line_of(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]

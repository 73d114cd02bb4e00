"""The engine: one thread that owns torch and steps every running sequence, requests in, events out.

A step is: drop who left or is late, admit who waits, decode one token of every sequence, read on in prompts, deliver.
What fails ends the requests that it was about with an error, and the engine lives on. When memory runs out, what is
kept for later prompts goes first and then the youngest request. It knows nothing about HTTP.

"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from tigerbot.chat import end_token_ids
from tigerbot.errors import InputError, ServeError
from tigerbot.spec import EngineSpec
from tigerbot_serve.engine.choose import choose
from tigerbot_serve.engine.decoding import Decoding, last
from tigerbot_serve.engine.embedding import Embeddings
from tigerbot_serve.engine.memory import out_of_memory
from tigerbot_serve.engine.prefill import Reader, States
from tigerbot_serve.engine.prefix import PrefixCache, public_prefixes
from tigerbot_serve.engine.request import EngineStats, FinishReason, Request
from tigerbot_serve.engine.rows import Rows, plan_of
from tigerbot_serve.engine.scheduler import Lane, Prefill, Scheduler
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.engine.speculate import Taken
from tigerbot_serve.engine.ticket import Handle, Ticket
from tigerbot_serve.ensemble.judge import Judge
from tigerbot_serve.ensemble.mixture import Mixture
from tigerbot_serve.ensemble.review import Review, Wanted

log = logging.getLogger(__name__)

REST_S = 0.05  # between looks at the clock while plug-ins are waited for: deadlines do not ring


class Engine:
    """Continuous batching over the members of a mixture.

    Attributes:
        tokenizer: the members' own.
        max_length: longest prompt and answer together, in tokens.
        fingerprint: changes with what decides a seed's text: members, heads, dial, code.
    """

    def __init__(
        self, mixture: Mixture, judge: Judge, spec: EngineSpec, *, threads: int | None = None, fingerprint: str = ""
    ) -> None:
        self.mixture, self.judge, self.spec = mixture, judge, spec
        self.fingerprint = fingerprint
        self.members = mixture.members
        self.tokenizer: Any = self.members.tokenizer
        self.max_length = min(spec.max_length, self.members.max_positions)
        self._threads = threads
        self._end_ids = frozenset(end_token_ids(self.tokenizer))
        self._scheduler = Scheduler(spec.slots, spec.max_queue, spec.prefill_chunk)
        self._rows = Rows(self.members, spec.slots, self.max_length + Decoding.slack(spec))
        self._decoding = Decoding(mixture, spec)
        public = public_prefixes(self.tokenizer, spec.public_prefix)
        self._prefix = PrefixCache(self.members.hashes, spec.prefix_cache_bytes, public)
        self._reader = Reader(self.mixture, self._prefix, self.max_length)
        self._embeddings = Embeddings(self.members, spec.prefill_chunk, spec.max_queue)
        self._lock = threading.Condition()
        self.review = Review(judge, mixture.spec, self._end_ids, self.max_length, self._wake)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._steps = self._decoded = self._gated = 0

    @property
    def alive(self) -> bool:
        """Whether the thread runs: false before `start`, after `stop`, and after a crash."""
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="tiger-engine", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """End the thread; requests under way end with an error.

        Raises:
            ServeError: a step did not end in time.
        """
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise ServeError(f"its step did not end in {timeout_s} s", where="engine", fix="end the process")

    def submit(self, request: Request, loop: asyncio.AbstractEventLoop) -> Handle:
        """Queue a request; its events arrive on `loop`. Callable from any thread.

        Raises:
            QueueFull: too many wait.
            InputError: the prompt does not fit, or is not of this vocabulary.
            ServeError: the engine is not running.
        """
        room = self.max_length - len(request.prompt_ids)
        if not request.prompt_ids or room < 1:
            raise InputError(
                f"the prompt has {len(request.prompt_ids)} tokens, wants 1 to {self.max_length - 1}",
                where="prompt",
                fix="shorten it",
            )
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self.members.vocab_size:
            raise InputError(
                f"token ids go from 0 to {self.members.vocab_size - 1}", where="prompt", fix="use this tokenizer"
            )
        draft = Sequence(
            request,
            self.tokenizer,
            self._end_ids,
            max_tokens=min(request.max_tokens, room),
            dial=request.dial,
            temperature=request.temperature,
            rng=random.Random(request.seed),
        )
        ticket = Ticket(request, Handle(loop, self._wake), draft)
        with self._lock:
            if not self.alive or self._stopping:
                raise ServeError("is not running", where="engine", fix="restart the replica")
            self._scheduler.submit(ticket)
            self._lock.notify()
        return ticket.handle

    def embed(self, texts: Items[tuple[int, ...]]) -> Future[Tensor]:
        """The base's vectors of texts (texts, d). Callable from any thread.

        Raises:
            QueueFull, InputError, ServeError: as `submit`.
        """
        if max(map(max, texts)) >= self.members.vocab_size:
            last = self.members.vocab_size - 1
            raise InputError(f"token ids go from 0 to {last}", where="input", fix="use this tokenizer")
        with self._lock:
            if not self.alive or self._stopping:
                raise ServeError("is not running", where="engine", fix="restart the replica")
            vectors = self._embeddings.add(texts)
            self._lock.notify()
        return vectors

    def stats(self) -> EngineStats:
        with self._lock:
            scheduler = self._scheduler
            return EngineStats(
                slots=scheduler.slots,
                slots_used=len(scheduler.running),
                queued=len(scheduler.waiting),
                outstanding_tokens=scheduler.outstanding_tokens(),
                tokens_decoded=self._decoded,
                steps=self._steps,
                prefix_bytes=self._prefix.bytes,
                prefix_tokens_reused=self._prefix.reused,
                tokens_gated=self._gated,
                tokens_drafted=self._decoding.speculation.drafted if self._decoding.speculation else 0,
                drafts_kept=self._decoding.speculation.kept if self._decoding.speculation else 0,
                gate_variation=self._decoding.gate.meter.variation if self._decoding.gate else 0.0,
            )

    def step(self) -> None:
        """One round over everything that runs."""
        self._drop_ending()
        self._admit()
        self._look_up()
        self._decode()
        self._prefill()
        self._embeddings.step()
        self._deliver()

    def _drop_ending(self) -> None:
        with self._lock:
            ending = self._scheduler.ending()
        for ticket, reason in ending:
            self._finish(ticket, reason)

    def _admit(self) -> None:
        with self._lock:
            admitted = self._scheduler.admit()
        for ticket in admitted:
            ticket.phase("draft")

    def _look_up(self) -> None:
        """Tickets whose plug-ins have answered go on."""
        for ticket in list(self._scheduler.running):
            if ticket.looking_up and not ticket.waits:
                self._follow(ticket, self.review.looked_up, ticket)

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
            tickets = [ticket for ticket in self._scheduler.running if ticket.current in sequences]
            for ticket in tickets[-1:] if spared else tickets:
                self._finish(ticket, "error", _line(error))
        for ticket in self._scheduler.running[::-1]:  # the outermost rows first: no row moves to be removed itself
            if ticket.current.finish_reason is not None and ticket.current in self._rows.sequences:
                self._gated += ticket.current.skipped
                self._rows.keep(ticket.current, self._prefix)
                self._rows.remove(ticket.current)
                self._attempt_ended(ticket)

    def _prefill(self) -> None:
        """Read on in the prompts, `prefill_chunk` tokens a step, so that a long one does not freeze the others."""
        left = 0
        for lane, share in self._scheduler.shares().items():
            left = self._read_lane(lane, left + share)

    def _read_lane(self, lane: Lane, budget: int) -> int:
        """Read in one lane; gives what is left of the budget."""
        while budget > 0 and (work := self._scheduler.next_prefill(lane)) is not None:
            try:
                budget -= self._read_on(work, budget)
            except Exception as error:
                log.exception("a prefill failed")
                if out_of_memory(error) and self._prefix.bytes and self._may_read_again(lane, work):
                    self._prefix.clear()
                    return 0
                for ticket in (work.ticket, *work.twins):
                    if ticket in self._scheduler.running:
                        self._give_up(ticket, error)
        return budget

    def _may_read_again(self, lane: Lane, work: Prefill) -> bool:
        """Whether a failed chunk left no trace: the text is still first and its end was not reached."""
        return self._scheduler.next_prefill(lane) is work and work.reading is None and not self._reader.whole(work)

    def _read_on(self, work: Prefill, budget: int) -> int:
        read, states = self._reader.read(work, budget)
        if self._reader.whole(work):
            self._scheduler.prefilled(work)
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
        plan = plan_of(sequences, (rows[0], rows[1]), self.members.device)
        self._give(list(zip(sequences, choose(self.mixture, sequences, plan, *states), strict=True)))
        for ticket, sequence in zip(tickets, sequences, strict=True):
            if sequence.finish_reason is None:
                self._rows.add(sequence, self._reader.scratch(work))
            else:
                self._attempt_ended(ticket)

    def _give(self, taken: Taken) -> None:
        """Tokens were taken; requests that are not held give them out."""
        tickets = {id(ticket.current): ticket for ticket in self._scheduler.running}
        for sequence, event in taken:
            tickets[id(sequence)].token(event)
        self._decoded += len(taken)

    def _attempt_ended(self, ticket: Ticket) -> None:
        """A text is whole: give it, or have it judged."""
        self._follow(ticket, self.review.ended, ticket)

    def _judged(self, work: Prefill) -> None:
        self._follow(work.ticket, self.review.judged, work.ticket, work.reading)

    def _follow(self, ticket: Ticket, ask: Callable[..., Wanted], *given: Any) -> None:
        """Do what the review wants next for a ticket; a review that fails costs the verdict."""
        try:
            wanted = ask(*given)
        except Exception:
            log.exception("the review failed")
            self.review.settle(ticket)
            wanted = None
        if isinstance(wanted, Sequence):
            ticket.attempts.append(wanted)
            self._scheduler.prefill(Prefill(ticket, wanted.prompt_ids))
        elif wanted is not None:
            self._scheduler.prefill(Prefill(ticket, wanted.ids, wanted))
        elif not ticket.looking_up:
            self._finish(ticket, ticket.kept.finish_reason or "stop")

    def _give_up(self, ticket: Ticket, error: Exception) -> None:
        """Reading for a ticket failed: a held answer that is whole is given unverified, another ends with an error."""
        if ticket.request.verify and ticket.kept.finish_reason is not None:
            self.review.settle(ticket)
            self._finish(ticket, ticket.kept.finish_reason)
        else:
            self._finish(ticket, "error", _line(error))

    def _finish(self, ticket: Ticket, reason: FinishReason, error: str = "") -> None:
        self._rows.remove(ticket.current)
        with self._lock:
            self._scheduler.release(ticket)
        ticket.finish(reason, error)
        ticket.flush()

    def _deliver(self) -> None:
        for ticket in self._scheduler.running:
            ticket.flush()

    def _fail(self, error: str, *, waiting: bool = False) -> None:
        """End every running request (and the waiting ones) with an error, and begin with empty rows."""
        with self._lock:
            tickets = [*self._scheduler.running, *(self._scheduler.waiting if waiting else ())]
        self._rows.clear()  # first: what is broken may not be worth moving
        for ticket in tickets:
            self._finish(ticket, "error", error)

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify()

    @torch.inference_mode()
    def _run(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)  # OpenMP's count belongs to the thread that sets it
        try:
            while self._wait_for_work():
                try:
                    self.step()
                    self._steps += 1
                except Exception as error:
                    log.exception("a step failed")
                    self._fail(_line(error))
        finally:
            self._fail("the engine stopped", waiting=True)
            self._embeddings.fail("the engine stopped")

    def _wait_for_work(self) -> bool:
        with self._lock:
            while ((self._scheduler.idle and self._embeddings.idle) or self._rests()) and not self._stopping:
                self._lock.wait(None if self._scheduler.idle else REST_S)
            return not self._stopping

    def _rests(self) -> bool:
        """Whether every running ticket waits for evidence, and nobody comes or goes."""
        scheduler = self._scheduler
        comes = scheduler.waiting and len(scheduler.running) < scheduler.slots
        return (
            self._embeddings.idle
            and not comes
            and bool(scheduler.running)
            and all(ticket.waits for ticket in scheduler.running)
            and not scheduler.ending()
        )


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]

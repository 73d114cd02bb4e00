"""The engine: one thread that owns torch and steps every running sequence, requests in, events out.

A step is: drop who cancelled, admit who waits, decode one token of every sequence, read on in the prompts, deliver.
A step that fails ends its requests with an error and the engine lives on. It knows nothing about HTTP.

Legend: R sequences of a step, d hidden width, V vocabulary.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Sequence as Items
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from tigerbot.chat import end_token_ids
from tigerbot.errors import InputError, ServeError
from tigerbot.spec import EngineSpec
from tigerbot_serve.engine.choose import choose
from tigerbot_serve.engine.embedding import Embeddings
from tigerbot_serve.engine.request import EngineStats, FinishReason, Request
from tigerbot_serve.engine.rows import Rows, plan_of
from tigerbot_serve.engine.scheduler import Prefill, Scheduler
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.engine.ticket import Handle, Ticket
from tigerbot_serve.ensemble.judge import Judge
from tigerbot_serve.ensemble.members import NOTHING, Feed
from tigerbot_serve.ensemble.mixture import Mixture, Plan

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching over the members of a mixture.

    Attributes:
        tokenizer: the members' own.
        max_length: longest prompt and answer together, in tokens.
    """

    def __init__(self, mixture: Mixture, judge: Judge, spec: EngineSpec, *, threads: int | None = None) -> None:
        self.mixture, self.judge, self.spec = mixture, judge, spec
        self.members = mixture.members
        self.tokenizer: Any = self.members.tokenizer
        self.max_length = min(spec.max_length, self.members.max_positions)
        self._threads = threads
        self._end_ids = frozenset(end_token_ids(self.tokenizer))
        self._scheduler = Scheduler(spec.slots, spec.max_queue)
        self._rows = Rows(self.members, spec.slots, self.max_length)
        self._scratch = self.members.caches(1, self.max_length)
        self._embeddings = Embeddings(self.members, spec.prefill_chunk, spec.max_queue)
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._steps = self._decoded = 0

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
            )

    def step(self) -> None:
        """One round over everything that runs."""
        self._drop_cancelled()
        self._admit()
        self._decode()
        self._prefill()
        self._embeddings.step()
        self._deliver()

    def _drop_cancelled(self) -> None:
        with self._lock:
            cancelled = self._scheduler.cancelled()
        for ticket in cancelled:
            self._finish(ticket, "cancelled")

    def _admit(self) -> None:
        with self._lock:
            admitted = self._scheduler.admit()
        for ticket in admitted:
            ticket.phase("draft")

    def _decode(self) -> None:
        if not self._rows.sequences:
            return
        creative, factual = self.members.forward(self._rows.caches, self._rows.feeds())
        self._advance(self._rows.sequences, self._rows.plan(), _last(creative), _last(factual))
        for ticket in list(self._scheduler.running):
            if ticket.current.finish_reason is not None and self._rows.remove(ticket.current):
                self._attempt_ended(ticket)

    def _prefill(self) -> None:
        """Read on in the prompts, `prefill_chunk` tokens a step, so that a long one does not freeze the others."""
        budget = self.spec.prefill_chunk
        while budget > 0 and (work := self._scheduler.next_prefill()) is not None:
            try:
                budget -= self._read_on(work, budget)
            except Exception as error:
                log.exception("a prefill failed")
                self._finish(work.ticket, "error", _line(error))

    def _read_on(self, work: Prefill, budget: int) -> int:
        chunk = work.ids[work.done : work.done + budget]
        feed = Feed((chunk,), (work.done,))
        sides = self.members.sides(0.0 if work.reading else work.ticket.current.dial)
        creative, factual = self.members.forward(
            self._scratch, (feed if 0 in sides else NOTHING, feed if 1 in sides else NOTHING)
        )
        if work.reading is not None:
            assert factual is not None
            work.reading.feed(work.done, factual[0])
            work.ticket.judge_tokens += len(chunk)
        else:
            work.ticket.current.prefilled += len(chunk)
        work.done += len(chunk)
        if work.done == len(work.ids):
            self._scheduler.prefilled()
            if work.reading is not None:
                self._judged(work)
            else:
                self._first_token(work.ticket, _last(creative), _last(factual))
        return len(chunk)

    def _first_token(self, ticket: Ticket, creative_1d: Tensor | None, factual_1d: Tensor | None) -> None:
        sequence = ticket.current
        rows = ([None if creative_1d is None else 0], [None if factual_1d is None else 0])
        self._advance([sequence], plan_of([sequence], rows, self.members.device), creative_1d, factual_1d)
        if sequence.finish_reason is None:
            self._rows.add(sequence, self._scratch)
        else:
            self._attempt_ended(ticket)

    def _advance(
        self, sequences: list[Sequence], plan: Plan, creative_Cd: Tensor | None, factual_Fd: Tensor | None
    ) -> None:
        """Every sequence takes its next token; requests that are not held give it out."""
        events = choose(self.mixture, sequences, plan, creative_Cd, factual_Fd)
        tickets = {id(ticket.current): ticket for ticket in self._scheduler.running}
        for sequence, event in zip(sequences, events, strict=True):
            tickets[id(sequence)].token(event)
        self._decoded += len(events)

    def _attempt_ended(self, ticket: Ticket) -> None:
        """A text is whole: give it, or have it judged."""
        attempt = ticket.current
        answer_ids = [token.token_id for token in attempt.answer]
        reading = None
        if ticket.request.verify:
            reading = self.judge.reading(ticket.request.dial, attempt.prompt_ids, answer_ids)
        if reading is not None:
            if not ticket.rewrites:
                ticket.phase("judge")
            self._scheduler.prefill(Prefill(ticket, reading.ids, reading))
        else:
            self._finish(ticket, ticket.kept.finish_reason or "stop")

    def _judged(self, work: Prefill) -> None:
        """The judge has read an attempt: keep it or not, rewrite once more or finish."""
        assert work.reading is not None
        ticket, opinion = work.ticket, work.reading.opinion()
        if ticket.opinion is None or self.judge.better(opinion, ticket.opinion):
            ticket.keep(opinion)
        assert ticket.opinion is not None
        ticket.verdict = self.judge.verdict(ticket.opinion, ticket.kept is not ticket.attempts[0])
        if ticket.verdict == "flagged" and ticket.rewrites < ticket.request.max_rewrites:
            ticket.phase("rewrite")
            ticket.attempts.append(self._rewrite_of(ticket))
            self._scheduler.prefill(Prefill(ticket, ticket.current.prompt_ids))
        else:
            self._finish(ticket, ticket.kept.finish_reason or "stop")

    def _rewrite_of(self, ticket: Ticket) -> Sequence:
        """Another attempt by the factual member alone; its draws continue the draft's, so the seed still decides."""
        draft = ticket.attempts[0]
        cool = self.mixture.spec.temperature_factual
        given = ticket.request.temperature
        return Sequence(
            ticket.request,
            self.tokenizer,
            self._end_ids,
            max_tokens=draft.max_tokens,
            dial=0.0,
            temperature=cool if given is None else min(cool, given),
            rng=draft.rng,
        )

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
        for ticket in tickets:
            self._finish(ticket, "error", error)
        self._rows.clear()

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
            while self._scheduler.idle and self._embeddings.idle and not self._stopping:
                self._lock.wait()
            return not self._stopping


def _last(hidden_RTd: Tensor | None) -> Tensor | None:
    return None if hidden_RTd is None else hidden_RTd[:, -1]


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]

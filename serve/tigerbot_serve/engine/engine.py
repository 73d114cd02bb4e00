"""The engine: one thread that owns torch and steps every running sequence, requests in, events out.

What a step does is `stepper.py`. Here is what other threads see: they queue requests and read numbers, under one lock.
A step that fails ends what was running with an error, and the engine lives on. It knows nothing about HTTP.
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
from tigerbot_serve.engine.request import EngineStats, Request, room_for
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.engine.stepper import Stepper
from tigerbot_serve.engine.ticket import Handle, Ticket
from tigerbot_serve.ensemble.judge import Judge
from tigerbot_serve.ensemble.mixture import Mixture
from tigerbot_serve.ensemble.review import Review

log = logging.getLogger(__name__)

STARVED = 3  # requests in a row that found no memory with the engine to themselves
REST_S = 0.05  # between looks at the clock while plug-ins are waited for: deadlines do not ring


class Engine:
    """Continuous batching over the members of a mixture.

    Attributes:
        tokenizer: the members' own.
        max_length: longest prompt and answer together, in tokens.
        stepper: what its thread runs.
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
        self._lock = threading.Condition()
        review = Review(judge, mixture.spec, self._end_ids, self.max_length, self._wake)
        self.stepper = Stepper(mixture, review, spec, self.max_length, self._lock)
        self._thread: threading.Thread | None = None
        self._stopping = False

    @property
    def alive(self) -> bool:
        """Whether the thread runs: false before `start`, after `stop`, and after a crash."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def starved(self) -> bool:
        """Whether memory is gone for good: not even a request alone gets a token. The next token ends it."""
        return self.stepper.hungry >= STARVED

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
        room = room_for(request, self.max_length, self.members.vocab_size)
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
            self.stepper.scheduler.submit(ticket)
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
            vectors = self.stepper.embeddings.add(texts)
            self._lock.notify()
        return vectors

    def stats(self) -> EngineStats:
        return self.stepper.stats()

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
                    self.stepper.step()
                except Exception as error:
                    log.exception("a step failed")
                    self.stepper.broke(error)
        finally:
            self.stepper.fail("the engine stopped", waiting=True)
            self.stepper.embeddings.fail("the engine stopped")

    def _wait_for_work(self) -> bool:
        with self._lock:
            while (self.stepper.idle or self.stepper.rests()) and not self._stopping:
                self._lock.wait(None if self.stepper.scheduler.idle else REST_S)
            return not self._stopping

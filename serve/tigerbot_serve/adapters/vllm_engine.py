"""vLLM's AsyncLLM as an engine of ours: the gateway's `Decoder`, for one model alone.

It lives in a thread with an event loop of its own, so that it holds up no client, and its scheduler and model in
processes of its own. Requests, texts, deadlines and events are those of our engine: only the drawing of tokens is
vLLM's. When one of its processes dies, requests end with an error and `alive` is false; the replica is replaced then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from contextlib import aclosing, suppress
from itertools import count
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tigerbot.chat import end_token_ids
from tigerbot.errors import InputError, ServeError, first_line
from tigerbot.models import load_tokenizer, model_hash, tokenizer_hash
from tigerbot.spec import ServeSpec
from tigerbot_serve.adapters.vllm_library import Vllm
from tigerbot_serve.adapters.vllm_sampling import sampling_fields, scored
from tigerbot_serve.adapters.vllm_settings import engine_args, environment
from tigerbot_serve.engine.request import EngineStats, FinishReason, Request, TokenEvent, room_for
from tigerbot_serve.engine.scheduler import QueueFull
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.engine.ticket import Handle, Ticket
from tigerbot_serve.ensemble.build import fingerprint

log = logging.getLogger(__name__)

STOPPED = "the engine stopped"


class VllmEngine:
    """Continuous batching by vLLM.

    Args:
        library: vLLM.

    Attributes:
        tokenizer: the model's own.
        max_length: longest prompt and answer together, in tokens.
        fingerprint: changes with what decides a seed's text: model, dial, code, vLLM.
    """

    def __init__(self, spec: ServeSpec, library: Vllm | None = None) -> None:
        folder = Path(spec.members.creative)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        self.spec, self._dial = spec.engine, spec.dial
        self.tokenizer: Any = load_tokenizer(folder)
        self.max_length = min(spec.engine.max_length, config.max_position_embeddings)
        self._library = library or Vllm()
        self.fingerprint = _fingerprint(spec, self._library.version)
        self._vocab_size: int = config.vocab_size
        self._end_ids = frozenset(token for token in end_token_ids(self.tokenizer) if token < config.vocab_size)
        self._args, self._environment = engine_args(spec, config, self.max_length), environment(spec)
        self._llm: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._running: dict[Ticket, asyncio.Task[None] | None] = {}
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._stop: asyncio.Event | None = None
        self._stopping = False
        self._failure = ""
        self._names = count()
        self._decoded = self._reused = 0

    @property
    def starved(self) -> bool:
        """Never: vLLM takes its memory when it starts."""
        return False

    @property
    def alive(self) -> bool:
        """Whether its thread and vLLM's processes run."""
        llm = self._llm
        return self._thread is not None and self._thread.is_alive() and llm is not None and not llm.errored

    def start(self) -> None:
        """Load the model; returns when requests are taken.

        Raises:
            ServeError: vLLM does not start.
        """
        os.environ.update(self._environment)
        self._stopping = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="tiger-vllm", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure:
            raise ServeError(f"vLLM does not start ({self._failure})", where="engine.vllm", fix="see the replica's log")

    def stop(self, timeout_s: float = 30.0) -> None:
        """End vLLM's processes; requests under way end with an error.

        Raises:
            ServeError: it did not end in time.
        """
        with self._lock:
            self._stopping = True
        if self._loop is not None and self._stop is not None:
            with suppress(RuntimeError):  # it has ended already
                self._loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise ServeError(f"vLLM did not end in {timeout_s} s", where="engine", fix="end the process")

    def submit(self, request: Request, loop: asyncio.AbstractEventLoop) -> Handle:
        """Give a request to vLLM; its events arrive on `loop`. Callable from any thread.

        Raises:
            QueueFull: too many wait.
            InputError: the prompt does not fit, or is not of this vocabulary.
            ServeError: the engine is not running.
        """
        room = room_for(request, self.max_length, self._vocab_size)
        draft = Sequence(
            request,
            self.tokenizer,
            self._end_ids,
            max_tokens=min(request.max_tokens, room),
            dial=request.dial,
            temperature=self._temperature(request),
            rng=random.Random(0),  # vLLM draws
        )
        handle = Handle(loop, lambda: self._call(self._drop, ticket))
        ticket = Ticket(request, handle, draft)
        with self._lock:
            if not self.alive or self._stopping:
                raise ServeError("is not running", where="engine", fix="restart the replica")
            waiting = len(self._running) - self.spec.slots
            if waiting >= self.spec.max_queue:
                raise QueueFull(f"{waiting} requests wait already", where="engine.max_queue", fix="try again later")
            self._running[ticket] = None
            self._call(self._begin, ticket)  # under the lock: a stop that comes now finds it
        return handle

    def embed(self, texts: Items[tuple[int, ...]]) -> Future[Any]:
        """Refuse: a vLLM that answers gives no states.

        Raises:
            InputError: always.
        """
        raise InputError("this model is served by vLLM, which gives no embeddings beside answers")

    def stats(self) -> EngineStats:
        """vLLM counts its own steps and does not tell."""
        with self._lock:
            tickets = list(self._running)
            return EngineStats(
                slots=self.spec.slots,
                slots_used=min(self.spec.slots, len(tickets)),
                queued=max(0, len(tickets) - self.spec.slots),
                outstanding_tokens=sum(ticket.current.left for ticket in tickets),
                tokens_decoded=self._decoded,
                steps=0,
                prefix_tokens_reused=self._reused,
            )

    def _temperature(self, request: Request) -> float:
        """The request's own, or the dial's: one model has no other weight than the dial itself."""
        if request.temperature is not None:
            return request.temperature
        cool, warm = self._dial.temperature_factual, self._dial.temperature_creative
        return (1 - request.dial) * cool + request.dial * warm

    def _call(self, act: Callable[[Ticket], None], ticket: Ticket) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop has ended, and with it every request
            self._loop.call_soon_threadsafe(act, ticket)

    async def _serve(self) -> None:
        """The thread's life."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        try:
            self._llm = self._library.start(self._args)
        except Exception as error:
            log.exception("vLLM does not start")
            self._failure = first_line(error)
            return
        finally:
            self._ready.set()
        try:
            await self._stop.wait()
            tasks = [task for task in self._running.values() if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            self._llm.shutdown()
            self._llm = None  # its finaliser wants a whole interpreter

    def _begin(self, ticket: Ticket) -> None:
        task = asyncio.get_running_loop().create_task(self._decode(ticket))
        with self._lock:
            self._running[ticket] = task
        # Not at the end of the task: one that is cancelled before its first step never runs.
        task.add_done_callback(lambda task: self._ended(ticket, task))

    def _drop(self, ticket: Ticket) -> None:
        task = self._running.get(ticket)
        if task is not None:
            task.cancel()

    def _ended(self, ticket: Ticket, task: asyncio.Task[None]) -> None:
        reason, error = self._end_of(ticket, task)
        with self._lock:
            del self._running[ticket]
        ticket.finish(reason, error)
        ticket.flush()

    def _end_of(self, ticket: Ticket, task: asyncio.Task[None]) -> tuple[FinishReason, str]:
        """Why a request ended, and what failed if something did."""
        if task.cancelled():
            return ("cancelled", "") if ticket.handle.cancelled else ("error", STOPPED)
        failure = task.exception()
        if failure is None:
            return ticket.current.finish_reason or "stop", ""
        if isinstance(failure, TimeoutError):
            return "deadline", ""
        if ticket.request.grammar is not None and self._library.refuses(failure):
            return "grammar", first_line(failure)
        log.error("vLLM failed a request", exc_info=failure)
        return "error", f"{type(failure).__name__}: {first_line(failure)}"

    async def _decode(self, ticket: Ticket) -> None:
        """Take tokens until the text is whole; leaving vLLM's generator ends its request."""
        request, sequence = ticket.request, ticket.current
        ticket.phase("draft")
        ticket.flush()
        assert sequence.temperature is not None
        fields = sampling_fields(
            request,
            temperature=sequence.temperature,
            max_tokens=sequence.max_tokens,
            end_ids=self._end_ids,
            eos_id=self.tokenizer.eos_token_id,
            vocab_size=self._vocab_size,
            floor=self._dial.plausibility,
        )
        prompt, params = self._library.prompt(request.prompt_ids, request.tenant), self._library.params(fields)
        async with asyncio.timeout(request.deadline_s):
            outputs = self._llm.generate(prompt, params, f"tiger-{next(self._names)}")
            async with aclosing(outputs):
                async for output in outputs:
                    self._take(ticket, output)
                    ticket.flush()
                    if sequence.finish_reason is not None and not output.finished:
                        return

    def _take(self, ticket: Ticket, output: Any) -> None:
        """What one output brings: the prompt's log-probabilities with the first, then tokens."""
        request, sequence = ticket.request, ticket.current
        if not sequence.prefilled:
            sequence.prefilled, sequence.cached = len(request.prompt_ids), output.num_cached_tokens or 0
            self._reused += sequence.cached
        if output.prompt_logprobs and request.prompt_logprobs is not None:
            for token, place in zip(request.prompt_ids, output.prompt_logprobs, strict=True):
                logprob, tops = scored(place, token, request.prompt_logprobs)
                sequence.read_prompt(TokenEvent("", token, logprob, tops, None, None, sequence.dial))
            ticket.prompt_read()
        if not sequence.max_tokens:
            sequence.finish_reason = "length"
            return
        (new,) = output.outputs
        for place, token in enumerate(new.token_ids):
            numbers = new.logprobs[place] if new.logprobs else None
            logprob, tops = scored(numbers, token, request.logprobs)
            ticket.token(sequence.append(token, logprob, tops, None, None, sequence.dial))
            self._decoded += 1
            if sequence.finish_reason is not None:
                return
        if output.finished:
            raise RuntimeError(f"vLLM ended the answer: {new.finish_reason}")


def _fingerprint(spec: ServeSpec, version: str) -> str:
    folder = spec.members.creative
    hashes = {"creative_hash": model_hash(folder), "tokenizer_hash": tokenizer_hash(folder), "vllm": version}
    return fingerprint(spec, hashes)

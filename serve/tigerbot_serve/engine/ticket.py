"""A request inside the engine: its handle outside, its attempts, and the events they become.

Without `verify` there is one attempt and its tokens leave as they come. With it every attempt is held; the tokens of
the one that was kept leave at the end. This module knows nothing about torch.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from tigerbot_serve.engine.request import (
    Event,
    FinishEvent,
    FinishReason,
    Phase,
    PhaseEvent,
    PromptEvent,
    Request,
    Summary,
    TokenEvent,
    Usage,
    Verdict,
)
from tigerbot_serve.engine.sequence import Sequence
from tigerbot_serve.ensemble.evidence import Evidence, Span
from tigerbot_serve.ensemble.judge import Opinion
from tigerbot_serve.plugins.lookups import Lookup

if TYPE_CHECKING:
    from tigerbot_serve.ensemble.review import Ground

REWRITE_MARGIN = 1.5  # a rewrite and its reading may take this much longer than the draft did


class Handle(AsyncIterator[Event]):
    """The caller's end: iterate over the events up to the FinishEvent, or cancel."""

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[], None]) -> None:
        self._loop, self._wake = loop, wake
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._done = False

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Stop decoding; the slot is free within one step. Callable from any thread, any number of times."""
        self._cancelled.set()
        self._wake()

    def deliver(self, events: list[Event]) -> None:
        """Called by the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._put, events)
        except RuntimeError:  # the caller's loop is closed: nobody will read
            self._cancelled.set()

    def _put(self, events: list[Event]) -> None:
        for event in events:
            self._events.put_nowait(event)

    def __aiter__(self) -> Handle:
        return self

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        event = await self._events.get()
        self._done = isinstance(event, FinishEvent)
        return event


class Ticket:
    """One request on its way through the engine.

    Attributes:
        attempts: the draft, then its rewrites. The last one is being decoded or judged.
        kept: the attempt whose text is given, so far.
        lookup: what plug-ins are asked, where they were; `looked_up` once it has been made use of.
        ground: what rewrites are made from; None while that is the request's own prompt.
        spans, draft_spans: what is doubted in the text that is given, and what was in the draft.
    """

    def __init__(self, request: Request, handle: Handle, draft: Sequence) -> None:
        self.request, self.handle = request, handle
        self.attempts = [draft]
        self.kept = draft
        self.opinion: Opinion | None = None
        self.verdict: Verdict = "unverified"
        self.judge_tokens = 0
        self.lookup: Lookup | None = None
        self.looked_up = False
        self.ground: Ground | None = None
        self.evidence: tuple[Evidence, ...] = ()
        self.reasons: list[str] = []
        self.spans: tuple[Span, ...] = ()
        self.draft_spans: tuple[Span, ...] = ()
        self._entered: dict[Phase, float] = {}
        self._until = None if request.deadline_s is None else time.monotonic() + request.deadline_s
        self._outbox: list[Event] = []

    @property
    def current(self) -> Sequence:
        return self.attempts[-1]

    @property
    def rewrites(self) -> int:
        return len(self.attempts) - 1

    @property
    def to_judge(self) -> bool:
        """Whether the judge may read the text that is whole now. A tool call is not its business."""
        unjudged = self.request.unjudged
        held = self.request.verify and self.current.finish_reason != "grammar"
        return held and not (unjudged and unjudged in self.current.text)

    @property
    def waits(self) -> bool:
        """Whether plug-ins are still looking something up: there is nothing to step."""
        return self.lookup is not None and not self.lookup.done

    @property
    def looking_up(self) -> bool:
        """Whether what plug-ins say has not been made use of yet."""
        return self.lookup is not None and not self.looked_up

    @property
    def time_for_a_rewrite(self) -> bool:
        """Whether another attempt can be expected to end before the deadline, by what the draft took."""
        if self._until is None:
            return True
        drafted_s = self._entered.get("judge", 0.0) - self._entered.get("draft", 0.0)
        return self._until - time.monotonic() > REWRITE_MARGIN * drafted_s

    def ending(self) -> FinishReason | None:
        """Why it ends now, whatever it is doing: its caller left, or its deadline passed.

        A held answer that is whole by then is given as it stands.
        """
        if self.handle.cancelled:
            return "cancelled"
        if self._until is None or time.monotonic() < self._until:
            return None
        return (self.request.verify and self.kept.finish_reason) or "deadline"

    def prompt_read(self) -> None:
        if self.request.prompt_logprobs is not None and not self.rewrites:
            self._outbox.append(PromptEvent(tuple(self.current.prompt_tokens)))

    def token(self, event: TokenEvent) -> None:
        if not self.request.verify:
            self._outbox.append(event)

    def phase(self, phase: Phase) -> None:
        self._entered.setdefault(phase, time.monotonic())
        if self.request.verify:
            self._outbox.append(PhaseEvent(phase))

    def keep(self, opinion: Opinion) -> None:
        """The current attempt is the answer so far; what the judge read replaces what was read while decoding."""
        self.kept, self.opinion = self.current, opinion
        for place, p_dev in enumerate(opinion.p_devs):
            self.kept.tokens[place] = replace(self.kept.tokens[place], p_dev=p_dev)

    def finish(self, reason: FinishReason, error: str = "") -> None:
        """The last event; before it the tokens of an answer that was held."""
        if self.request.verify and reason in ("stop", "length"):
            self._outbox += self.kept.tokens
        dropped = [attempt for attempt in self.attempts if attempt is not self.kept]
        usage = Usage(
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=len(self.kept.tokens),
            draft_tokens=sum(len(attempt.tokens) for attempt in dropped),
            judge_tokens=self.judge_tokens,
            cached_tokens=self.attempts[0].cached,
        )
        self._outbox.append(FinishEvent(reason, usage, self._summary(), error or self.kept.failure))

    def flush(self) -> None:
        """Give what has gathered in this step, in one wake-up of the caller's loop."""
        if self._outbox:
            self.handle.deliver(self._outbox)
            self._outbox = []

    def _summary(self) -> Summary:
        answer = self.kept.answer
        weights = [token.w for token in answer]
        risks = [token.p_dev for token in answer if token.p_dev is not None]
        draft = self.attempts[0] if self.kept is not self.attempts[0] else None
        want = self.request.want_tokens
        told = want or self.request.want_evidence
        return Summary(
            dial=self.request.dial,
            w_mean=sum(weights) / len(weights) if weights else self.request.dial,
            p_dev_max=max(risks, default=None),
            verdict=self.verdict,
            rewrites=self.rewrites,
            gate_rate=self.kept.skipped / len(self.kept.tokens) if self.kept.skipped else None,
            tokens=tuple(self.kept.tokens) if want else (),
            draft=draft.text if draft else None,
            draft_tokens=tuple(draft.tokens) if draft and want else (),
            evidence=self.evidence if told else (),
            reasons=tuple(self.reasons) if told else (),
            flagged=self.spans if told else (),
            draft_flagged=self.draft_spans if told and draft else (),
        )

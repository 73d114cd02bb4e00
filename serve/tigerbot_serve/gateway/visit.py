"""What is known of one HTTP request, from its first byte to its last token: who, what, how many tokens, when.

A visit is open while its answer is sent and while its tokens are still being counted; then it is told once to whoever
counts, logs and traces. It holds no text of a request and none of an answer.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from tigerbot_serve.engine.request import Event, FinishEvent, PhaseEvent, Summary, TokenEvent
from tigerbot_serve.engine.ticket import Handle
from tigerbot_serve.gateway.keys import Key
from tigerbot_serve.gateway.ledger import Tokens
from tigerbot_serve.gateway.recent import Weights

CLIENT_LEFT = 499


@dataclass(slots=True)
class Visit:
    """One request.

    Attributes:
        route: the path of its route, "other" where there is none: few values, whatever clients ask for.
        user: pseudonym of the user it is made for.
        status: of the answer; 499 where the client left before its end.
        code: of an error.
        began: by the clock `time.perf_counter`, as all times here; `epoch` is the same moment since 1970.
        marks: what happened when, in order: admitted, phases of held answers, first_token, finished, answered.
        seen: tokens of the answer that were delivered; `weights` are their w.
        judged: whether the answer was held for the judge.
        each: answers to a prompt.
    """

    request_id: str
    route: str
    told: Callable[[Visit], None]
    began: float = field(default_factory=time.perf_counter)
    epoch: float = field(default_factory=time.time)
    traceparent: str = ""
    key: Key | None = None
    user: str = ""
    status: int = CLIENT_LEFT
    code: str = ""
    tokens: Tokens = field(default_factory=Tokens)
    summaries: list[Summary] = field(default_factory=list)
    marks: list[tuple[str, float]] = field(default_factory=list)
    first_token: float | None = None
    last_token: float | None = None
    ended: float = 0.0
    seen: int = 0
    weights: Weights = field(default_factory=Weights)
    judged: bool = False
    each: int = 1
    _open: int = 0
    _read: int = 0

    def enter(self) -> None:
        """Somebody is not done with it."""
        self._open += 1

    def leave(self) -> None:
        """Somebody is; the last one closes it."""
        self._open -= 1
        if self._open == 0:
            self.ended = time.perf_counter()
            self.told(self)

    def mark(self, name: str) -> None:
        self.marks.append((name, time.perf_counter()))

    def saw(self, event: Event) -> None:
        """An event of one of its answers arrived."""
        if isinstance(event, TokenEvent):
            self.seen += 1
            self.weights.add(event.w)
            if self.first_token is None:
                self.first_token = time.perf_counter()
                self.marks.append(("first_token", self.first_token))
        elif isinstance(event, PhaseEvent):
            self.mark(event.phase)
        elif isinstance(event, FinishEvent):
            self._finished(event)

    def timeline(self) -> list[dict[str, str | float]]:
        """Its marks as milliseconds since it began."""
        return [{"event": name, "ms": round(1000 * (moment - self.began), 3)} for name, moment in self.marks]

    def _finished(self, event: FinishEvent) -> None:
        self.last_token = time.perf_counter()
        self.marks.append(("finished", self.last_token))
        self.summaries.append(event.summary)
        used, before = event.usage, self.tokens
        self._read += used.prompt_tokens
        self.tokens = Tokens(
            prompt=-(-self._read // self.each),  # the prompt of n answers is one prompt
            completion=before.completion + used.completion_tokens,
            draft=before.draft + used.draft_tokens,
            judge=before.judge + used.judge_tokens,
        )


class Watched(AsyncIterator[Event]):
    """A handle whose events its visit sees too. `finished` is whether the last one came."""

    def __init__(self, inner: Handle, visit: Visit) -> None:
        self._inner, self._visit = inner, visit
        self.finished = False

    def cancel(self) -> None:
        self._inner.cancel()

    def __aiter__(self) -> Watched:
        return self

    async def __anext__(self) -> Event:
        event = await self._inner.__anext__()
        self._visit.saw(event)
        if isinstance(event, FinishEvent):
            self.finished = True
        return event

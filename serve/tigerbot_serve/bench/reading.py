"""One answer as it is read: when its first event and its first token came, how many tokens, and what went wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """One request. Times are seconds since the run began; a stage that was not reached has None.

    Attributes:
        due: when it was to be sent: latencies count from here, so that a server that stalls cannot hide the requests
            it kept from being sent (coordinated omission).
        event: the first server-sent event, or the first byte of an answer that is no stream.
        token, last: the first and the last piece of text of a stream.
        tokens: output tokens as the server counts them, else pieces of text.
        error: its kind, "" for a whole answer.
    """

    due: float
    sent: float
    event: float | None
    token: float | None
    last: float | None
    end: float
    tokens: int
    error: str


@dataclass
class Reading:
    """A `wire.Reader` of one answer."""

    stream: bool
    clock: Callable[[], float] = time.perf_counter
    status: int = 0
    event: float | None = None
    token: float | None = None
    last: float | None = None
    error: str = ""
    _tail: bytes = b""
    _pieces: int = 0
    _counted: int | None = None
    _done: bool = False

    def head(self, status: int) -> None:
        self.status = status

    def data(self, data: bytes) -> None:
        if self.status != 200 or not self.stream:
            if self.event is None:
                self.event = self.clock()
            self._tail += data
            return
        lines = (self._tail + data).split(b"\n")
        self._tail = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._chunk(line[5:].strip())

    def close(self) -> None:
        """The answer ended as HTTP wants it: was it whole?"""
        if self.status != 200:
            self.error = f"{self.status} {_code(self._tail)}".strip()
        elif self.stream:
            if not self._done and not self.error:
                self.error = "broken stream"
        else:
            self._whole()

    @property
    def tokens(self) -> int:
        return self._pieces if self._counted is None else self._counted

    def _chunk(self, data: bytes) -> None:
        if self.event is None:
            self.event = self.clock()
        if data == b"[DONE]":
            self._done = True
            return
        chunk = _object(data)
        if chunk is None or chunk.get("error"):
            self.error = self.error or ("bad answer" if chunk is None else f"stream {_code(data)}".strip())
            return
        if _text(chunk):
            self.last = self.clock()
            self.token = self.last if self.token is None else self.token
            self._pieces += 1
        self._count(chunk)

    def _whole(self) -> None:
        answer = _object(self._tail)
        if answer is None or not isinstance(answer.get("choices"), list) or not answer["choices"]:
            self.error = "bad answer"
        else:
            self._count(answer)

    def _count(self, answer: dict[str, Any]) -> None:
        spent = answer.get("usage")
        if isinstance(spent, dict) and isinstance(spent.get("completion_tokens"), int):
            self._counted = spent["completion_tokens"]


def _text(chunk: dict[str, Any]) -> bool:
    """Whether a chunk holds text, of whatever kind the server streams."""
    for choice in chunk.get("choices") or ():
        if choice.get("text"):
            return True
        delta = choice.get("delta") or {}
        if any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")):
            return True
    return False


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _code(data: bytes) -> str:
    """The code of an error body, short: it becomes a row of a table."""
    found = (_object(data) or {}).get("error")
    code = found.get("code") or found.get("type") if isinstance(found, dict) else None
    return str(code)[:40] if code else ""

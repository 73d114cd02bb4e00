"""Embeddings: texts read by the experts' base on the engine's thread, a piece between two steps of decoding.

A text's vector is the mean of its final hidden states, of length 1. Texts of a piece are padded on the right: attention
is causal, so that changes nothing before it. A text longer than a piece is read on in the next ones. This module knows
nothing about HTTP.

Legend: R texts of a piece, T their longest, d hidden width.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError

import torch
from torch import Tensor

from tigerbot.errors import ServeError
from tigerbot_serve.engine.memory import NoMemory, out_of_memory
from tigerbot_serve.engine.scheduler import QueueFull
from tigerbot_serve.ensemble.members import Caches, Feed, Members

log = logging.getLogger(__name__)

Ids = tuple[int, ...]


class Embeddings:
    """Requests for vectors, first come, first served. `step` runs on the engine's thread, `add` on any."""

    def __init__(self, members: Members, piece: int, max_queue: int) -> None:
        self._members, self._piece, self._max_queue = members, piece, max_queue
        self._waiting: deque[_Reading] = deque()
        self._lock = threading.Lock()

    @property
    def idle(self) -> bool:
        return not self._waiting

    def add(self, texts: Sequence[Ids]) -> Future[Tensor]:
        """Vectors (texts, d), float32 on the CPU; cancel it to have it dropped.

        Raises:
            QueueFull: too many wait.
        """
        with self._lock:
            if len(self._waiting) >= self._max_queue:
                raise QueueFull(f"{self._max_queue} requests wait already", where="engine.max_queue", fix="wait")
            reading = _Reading(self._members, texts, self._piece)
            self._waiting.append(reading)
        return reading.result

    def step(self) -> None:
        """Read one piece of the oldest request."""
        if not self._waiting:
            return
        reading = self._waiting[0]
        try:
            over = reading.result.cancelled() or reading.step()
        except Exception as error:
            log.exception("an embedding failed")
            reading.fail(f"{type(error).__name__}: {error}", NoMemory if out_of_memory(error) else ServeError)
            over = True
        if over:
            self._waiting.popleft()

    def fail(self, why: str) -> None:
        """Nobody will read the rest."""
        while self._waiting:
            self._waiting.popleft().fail(why)


class _Reading:
    """The texts of one request, shortest first so that little is padded."""

    def __init__(self, members: Members, texts: Sequence[Ids], piece: int) -> None:
        self.result: Future[Tensor] = Future()
        self._members, self._texts, self._piece = members, texts, piece
        self._left = deque(sorted(range(len(texts)), key=lambda index: len(texts[index])))
        self._vectors_d: dict[int, Tensor] = {}
        self._long: _Long | None = None

    def step(self) -> bool:
        """Read at most a piece; true when every text is read."""
        if len(self._texts[self._left[0]]) > self._piece:
            self._read_long()
        else:
            self._read_short()
        if self._left:
            return False
        found_Rd = torch.stack([self._vectors_d[index] for index in range(len(self._texts))])
        try:
            self.result.set_result(torch.nn.functional.normalize(found_Rd, dim=-1).cpu())
        except InvalidStateError:
            log.debug("an embedding was cancelled at its end")
        return True

    def fail(self, why: str, kind: type[ServeError] = ServeError) -> None:
        try:
            self.result.set_exception(kind(why, where="embedding", fix="ask again"))
        except InvalidStateError:
            log.debug("an embedding was cancelled before it failed")

    def _read_short(self) -> None:
        batch: list[int] = []
        # The next text is the longest so far: it sets the width of the whole piece.
        while self._left and (len(batch) + 1) * len(self._texts[self._left[0]]) <= self._piece:
            batch.append(self._left.popleft())
        width = len(self._texts[batch[-1]])
        padded = [(*self._texts[index], *[0] * (width - len(self._texts[index]))) for index in batch]
        hidden_RTd = self._members.read_base(self._members.caches(len(batch), width), Feed(padded, [0] * len(batch)))
        for index, hidden_Td in zip(batch, hidden_RTd, strict=True):
            self._vectors_d[index] = hidden_Td[: len(self._texts[index])].float().mean(dim=0)

    def _read_long(self) -> None:
        ids = self._texts[self._left[0]]
        state = self._long or _Long(self._members.caches(1, len(ids)))
        piece = ids[state.done : state.done + self._piece]
        hidden_Td = self._members.read_base(state.caches, Feed([piece], [state.done]))[0].float()
        state.sum_d = hidden_Td.sum(dim=0) if state.sum_d is None else state.sum_d + hidden_Td.sum(dim=0)
        state.done += len(piece)
        self._long = state
        if state.done == len(ids):
            self._vectors_d[self._left.popleft()] = state.sum_d / len(ids)
            self._long = None


class _Long:
    """A text under way."""

    def __init__(self, caches: Caches) -> None:
        self.caches = caches
        self.done = 0
        self.sum_d: Tensor | None = None

"""A vLLM that says what it is told to: what a test of the adapter needs of it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


class Wrong(Exception):
    """What vLLM raises of a request that it does not take."""


@dataclass
class StandIn:
    """The library and its one AsyncLLM.

    Attributes:
        says: token ids of every answer.
        together: how many tokens an output brings.
        hold: after how many tokens it says no more.
        error: raised instead of answering.
        started, asked, left: engine arguments, (prompt, fields) of requests, names of those that were left early.
    """

    says: Sequence[int] = ()
    together: int = 1
    hold: int | None = None
    error: Exception | None = None
    version: str = "0"
    errored: bool = False
    started: list[Mapping[str, Any]] = field(default_factory=list)
    asked: list[tuple[Any, Mapping[str, Any]]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def start(self, args: Mapping[str, Any]) -> StandIn:
        self.started.append(args)
        if self.error is not None:
            raise self.error
        return self

    def params(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        return fields

    def prompt(self, ids: Sequence[int], salt: str) -> tuple[tuple[int, ...], str]:
        return tuple(ids), salt

    def refuses(self, error: BaseException) -> bool:
        return isinstance(error, Wrong)

    def shutdown(self) -> None:
        self.errored = True

    async def generate(self, prompt: Any, fields: Mapping[str, Any], name: str) -> AsyncIterator[Any]:
        self.asked.append((prompt, fields))
        if self.error is not None:
            raise self.error
        ids = list(self.says)[: fields["max_tokens"]]
        try:
            for at in range(0, len(ids), self.together):
                if self.hold is not None and at >= self.hold:
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                yield _output(prompt[0], ids, slice(at, at + self.together), fields)
        except (asyncio.CancelledError, GeneratorExit):
            self.left.append(name)
            raise


def _output(prompt_ids: Sequence[int], ids: Sequence[int], part: slice, fields: Mapping[str, Any]) -> Any:
    new, finished = ids[part], part.stop >= len(ids)
    wanted, of_prompt = fields["logprobs"], fields["prompt_logprobs"]
    places = None if wanted is None else [_place(token, wanted) for token in new]
    begin = [None, *(_place(token, of_prompt) for token in prompt_ids[1:])]
    return SimpleNamespace(
        finished=finished,
        num_cached_tokens=1,
        prompt_logprobs=begin if of_prompt is not None and part.start == 0 else None,
        outputs=[SimpleNamespace(token_ids=new, logprobs=places, finish_reason="length" if finished else None)],
    )


def _place(token: int, wanted: int) -> dict[int, Any]:
    """A token of rank 3, beside the likeliest two at most."""
    found = {token: SimpleNamespace(logprob=math.log(0.1), rank=3)}
    others = [other for other in (70, 71, 72) if other != token]
    for rank, other in enumerate(others[:wanted], start=1):
        found[other] = SimpleNamespace(logprob=math.log(0.5 / rank), rank=rank)
    return found

"""Reading prompts into scratch rows, chunk by chunk, from where a known prefix ends.

Each lane of the scheduler has a scratch row of its own, so that a short prompt can be read while a long one is under
way. Both sides of a prompt need not stand at the same place: the one that is behind is read alone until it has caught
up. This module knows nothing about what is done with the states.

Legend: T tokens of a chunk, d hidden width.
"""

from __future__ import annotations

from torch import Tensor

from tigerbot_serve.engine.echo import read_prompt
from tigerbot_serve.engine.prefix import PrefixCache
from tigerbot_serve.engine.scheduler import Lane, Prefill
from tigerbot_serve.ensemble.members import CREATIVE, FACTUAL, NOTHING, Caches, Feed
from tigerbot_serve.ensemble.mixture import Mixture

States = tuple[Tensor | None, Tensor | None]


class Reader:
    """The scratch rows and the prefix cache."""

    def __init__(self, mixture: Mixture, prefix: PrefixCache, max_length: int) -> None:
        self._mixture, self._members, self._prefix = mixture, mixture.members, prefix
        self._scratch = {lane: self._members.caches(1, max_length) for lane in Lane}

    def scratch(self, work: Prefill) -> Caches:
        """Where the work's tokens are read into: row 0 of each side."""
        return self._scratch[work.lane]

    def read(self, work: Prefill, budget: int) -> tuple[int, States]:
        """Read up to `budget` further tokens; gives how many, and both sides' states (1, T, d) of them.

        The last chunk of a work holds the states of all its sides.
        """
        sides = self._sides(work)
        if not work.begun:
            self._begin(work, sides)
        start = min(work.done[side] for side in sides)
        ahead = [work.done[side] for side in sides if work.done[side] > start]
        stop = min(start + budget, len(work.ids), *ahead)
        feed = Feed((work.ids[start:stop],), (start,))
        fed = [side for side in sides if work.done[side] == start]
        states = self._members.forward(
            self.scratch(work), (feed if CREATIVE in fed else NOTHING, feed if FACTUAL in fed else NOTHING)
        )
        if work.reading is not None:
            factual_1Td = states[FACTUAL]
            assert factual_1Td is not None
            work.reading.feed(start, factual_1Td[0])
        else:
            read_prompt(self._mixture, work.ticket.current, start, *states)
        for side in fed:
            work.done[side] = stop
        self._count(work, sides)
        if self.whole(work):
            self._keep(work, sides)
        return stop - start, states

    def whole(self, work: Prefill) -> bool:
        return all(work.done[side] == len(work.ids) for side in self._sides(work))

    def _sides(self, work: Prefill) -> tuple[int, ...]:
        return (FACTUAL,) if work.reading is not None else self._members.sides(work.ticket.current.dial)

    def _begin(self, work: Prefill, sides: tuple[int, ...]) -> None:
        """Take what is known. The states of the last prompt token, and of a judged answer, are wanted: they are read."""
        limit = work.reading.prompt_length - 1 if work.reading is not None else len(work.ids) - 1
        work.begun = True
        if work.reading is None and work.ticket.request.prompt_logprobs is not None:
            return  # every state is wanted
        for side in sides:
            work.done[side] = self._prefix.restore(
                side, work.ticket.request.tenant, work.ids[:limit], self.scratch(work)
            )
        if work.reading is None:
            work.ticket.current.cached = min(work.done[side] for side in sides)

    def _count(self, work: Prefill, sides: tuple[int, ...]) -> None:
        read = min(work.done[side] for side in sides)
        if work.reading is None:
            work.ticket.current.prefilled = read
        else:
            work.ticket.judge_tokens += read - work.counted
            work.counted = read

    def _keep(self, work: Prefill, sides: tuple[int, ...]) -> None:
        for side in sides:
            self._prefix.store(side, work.ticket.request.tenant, work.ids, self.scratch(work))

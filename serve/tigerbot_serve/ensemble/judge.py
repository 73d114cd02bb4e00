"""The judge: the factual member's reading of a finished answer, a score, and what follows from it.

The reading is one prefill over the answer, or none where the factual member has seen every token while it was decoded.

The score is the mean of the highest third of the answer's p_dev: one wrong name in a short answer counts, and a long
answer is not worse for being long, as a maximum would make it. Beside it stands the factual member's mean
log-probability of the answer: a rewrite must not be less likely than the draft. It never says that an answer is true.

Legend: T tokens fed, d hidden width, e = d + 1 numbers that p_dev reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tigerbot.spec import JudgeSpec
from tigerbot.surprise import lingering
from tigerbot_serve.engine.request import Verdict
from tigerbot_serve.engine.sequence import Sequence as Attempt
from tigerbot_serve.ensemble.heads import Heads
from tigerbot_serve.ensemble.members import FACTUAL, Members
from tigerbot_serve.ensemble.pull import Pull
from tigerbot_serve.plugins.lookups import Lookups


def score(p_devs: Sequence[float]) -> float:
    """Mean of the highest third (at least one token), 0 for none.

    A third of a token count that three does not divide takes part of a token, so that saying the same thing again
    changes nothing.
    """
    left = share = max(1.0, len(p_devs) / 3)
    total = 0.0
    for p_dev in sorted(p_devs, reverse=True):
        part = min(1.0, left)
        total, left = total + part * p_dev, left - part
        if left <= 0:
            break
    return total / share


@dataclass(frozen=True)
class Opinion:
    """What the judge read: p_dev of every token of the answer, its score, the factual member's mean log-probability."""

    p_devs: tuple[float, ...]
    score: float
    mean_logprob: float


class Reading:
    """A prefill under way over prompt and answer; `feed` takes the factual states of the next chunk.

    With `pull` the factual member expects what the evidence says: surprise and p_dev are read accordingly.
    """

    def __init__(
        self, members: Members, heads: Heads, prompt_length: int, ids: Sequence[int], pull: Pull | None = None
    ) -> None:
        self.ids, self._pull = tuple(ids), pull
        self._members, self._heads, self._prompt = members, heads, prompt_length
        self._p_devs: list[float] = []
        self._logprobs: list[float] = []
        self._lingering = 0.0

    @property
    def prompt_length(self) -> int:
        """The states of all but the last of these tokens are not wanted."""
        return self._prompt

    def feed(self, start: int, hidden_Td: Tensor) -> None:
        """States of the tokens from `start` on."""
        first = max(start, self._prompt - 1)
        following = self.ids[first + 1 : start + len(hidden_Td) + 1]
        if following:
            before_Td = hidden_Td[first - start :][: len(following)]
            logprobs_TV = self._pulled(self._members.log_probabilities(FACTUAL, before_Td), first + 1 - self._prompt)
            chosen_T1 = logprobs_TV.gather(1, torch.tensor(following, device=logprobs_TV.device)[:, None])
            self._logprobs += chosen_T1[:, 0].tolist()
        answer_Td = hidden_Td[max(0, self._prompt - start) :]
        if len(answer_Td):
            surprises = [-logprob for logprob in self._logprobs[len(self._p_devs) :][: len(answer_Td)]]
            found = lingering(surprises, self._lingering)
            self._lingering = found[-1]
            read_Te = torch.cat([answer_Td.float(), torch.tensor(found, device=answer_Td.device)[:, None]], dim=1)
            self._p_devs += self._heads.p_dev(read_Te).tolist()

    def _pulled(self, logprobs_TV: Tensor, said: int) -> Tensor:
        """What the evidence makes of rows that choose the answer's tokens from number `said` on."""
        if self._pull is None:
            return logprobs_TV
        answer = self.ids[self._prompt :]
        rows = [self._pull.add(row_V, answer[: said + row]) for row, row_V in enumerate(logprobs_TV)]
        return torch.log_softmax(torch.stack(rows), dim=-1)

    def opinion(self) -> Opinion:
        mean = sum(self._logprobs) / max(1, len(self._logprobs))
        return Opinion(tuple(self._p_devs), score(self._p_devs), mean)


class Judge:
    """Reads answers and decides. Without heads, or with one model alone, it has no opinion."""

    def __init__(self, members: Members, heads: Heads | None, spec: JudgeSpec, lookups: Lookups | None = None) -> None:
        self.members, self.heads, self.spec = members, heads, spec
        self.lookups = lookups or Lookups({})

    def reading(
        self, dial: float, prompt_ids: Sequence[int], answer_ids: Sequence[int], pull: Pull | None = None
    ) -> Reading | None:
        """A reading to prefill, or None where there is nothing to say: creative work, no heads, an empty answer."""
        if self.heads is None or self.members.alone or dial > self.spec.off_above_dial or not answer_ids:
            return None
        return Reading(self.members, self.heads, len(prompt_ids), (*prompt_ids, *answer_ids), pull)

    def heard(self, attempt: Attempt) -> Opinion | None:
        """The opinion that a reading would come to, where decoding has read all of it already.

        That is where no step went without the factual member, and the last token of the text was fed: it was followed by
        the one that ends the turn.
        """
        answer = attempt.answer
        p_devs = tuple(token.p_dev for token in answer if token.p_dev is not None)
        whole = len(answer) < len(attempt.tokens) == len(attempt.expected) and not attempt.skipped
        if not whole or len(p_devs) < len(answer):
            return None
        return Opinion(p_devs, score(p_devs), sum(attempt.expected[:-1]) / len(answer))

    def doubts(self, opinion: Opinion) -> bool:
        return opinion.score > self.spec.threshold

    def better(self, new: Opinion, old: Opinion) -> bool:
        """Whether a rewrite is worth keeping: clearly less doubtful, and no less likely to the factual member."""
        return new.score <= old.score - self.spec.margin and new.mean_logprob >= old.mean_logprob

    def verdict(self, kept: Opinion, rewritten: bool) -> Verdict:
        if self.doubts(kept):
            return "flagged"
        return "rewritten" if rewritten else "ok"

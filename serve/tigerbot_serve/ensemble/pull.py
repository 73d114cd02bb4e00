"""How evidence reaches the next token without being read as text: a bonus for the words it would go on with.

An answer may begin to copy at any word of a quotation, then its next words are favoured while it keeps to them, and
where it leaves the quotation the bonus ends. Which word fits is still the model's choice: the bonus is a few nats, so a
quotation can tip a doubtful choice and cannot dictate an unlikely one. Instructions in it are words like all others.
It helps models that were never taught to read a quotation; those that were get the quotations in the prompt as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tigerbot.chat import encode_plain
from tigerbot_serve.ensemble.evidence import Evidence

MAX_BEGINNINGS = 512
_AHEAD = 40  # characters from a beginning on that can be copied
_BEGINNING = re.compile(r"[一-鿿]|[^\W_一-鿿]+")

_Path = tuple[tuple[int, ...], float]  # token ids, weight


class Pull:
    """What some quotations lend to an answer.

    Args:
        question: its own words are not pulled: they stand in every quotation about it.
        strength: nats for a quotation of weight 1.
        copies: how many times an answer may begin to copy.
    """

    def __init__(
        self, tokenizer: Any, evidence: Iterable[Evidence], question: str, *, strength: float, copies: int = 1
    ) -> None:
        self._copies = copies
        known = {*encode_plain(tokenizer, question), *encode_plain(tokenizer, f" {question}")}
        self._first: list[_Path] = []  # where nothing has been said: words without the space before them
        self._later: list[_Path] = []
        for one in evidence:
            for found in _BEGINNING.finditer(one.text):
                if len(self._first) >= MAX_BEGINNINGS:
                    return
                text = one.text[found.start() : found.start() + _AHEAD]
                spaced = one.text[:1] if found.start() == 0 else one.text[found.start() - 1]
                paths = (self._first, text), (self._later, f" {text}" if spaced.isspace() else text)
                for among, words in paths:
                    ids = tuple(encode_plain(tokenizer, words))
                    if ids and ids[0] not in known:
                        among.append((ids, strength * one.weight))

    def bonus(self, said: Sequence[int]) -> dict[int, float]:
        """Token ids that may come next, and the nats that each gets."""
        following, copies = self._followed(said)
        found: dict[int, float] = {}
        for ids, nats in following:
            found[ids[0]] = max(found.get(ids[0], 0.0), nats)
        if not following and copies < self._copies:
            for ids, nats in self._first if not said else self._later:
                found[ids[0]] = max(found.get(ids[0], 0.0), nats)
        return found

    def add(self, logprobs_V: Tensor, said: Sequence[int]) -> Tensor:
        """The row with the bonus in it, not normalised."""
        found = self.bonus(said)
        if not found:
            return logprobs_V
        ids_K = torch.tensor(list(found), device=logprobs_V.device)
        nats_K = torch.tensor(list(found.values()), dtype=logprobs_V.dtype, device=logprobs_V.device)
        return logprobs_V.index_add(0, ids_K, nats_K)

    def _followed(self, said: Sequence[int]) -> tuple[list[_Path], int]:
        """What is left of the quotations that the answer is copying, and how often it has begun to copy."""
        following: list[_Path] = []
        copies = 0
        for place, token in enumerate(said):
            following = [(ids[1:], nats) for ids, nats in following if ids[0] == token and len(ids) > 1]
            if not following and copies < self._copies:
                begun = [path for path in (self._first if not place else self._later) if path[0][0] == token]
                copies += bool(begun)
                following = [(ids[1:], nats) for ids, nats in begun if len(ids) > 1]
        return following, copies

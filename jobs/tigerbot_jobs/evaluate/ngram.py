"""A 5-gram language model with interpolated Kneser-Ney smoothing (Kneser & Ney 1995; Chen & Goodman 1998).

The floor under the base model: a transformer that does not beat it on held-out text has learned nothing that
counting does not know. It sees the same tokens, so both are compared in bits per byte of the same text.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence


class NGram:
    """Counts of a token stream.

    Args:
        sequences: token id sequences, one a document.
        vocab_size: V, the uniform floor under unseen unigrams.
        order: n of the n-gram.
    """

    discount = 0.75

    def __init__(self, sequences: Iterable[Sequence[int]], vocab_size: int, order: int = 5) -> None:
        self.order, self.vocab_size = order, vocab_size
        grams = Counter(
            tuple(sequence[max(0, end - order) : end]) for sequence in sequences for end in range(1, len(sequence) + 1)
        )
        self._counts = [self._continuations(grams, n) for n in range(1, order)]
        self._counts.append({gram: count for gram, count in grams.items() if len(gram) == order})
        self._totals, self._kinds = zip(*(self._context_sums(counts) for counts in self._counts), strict=True)

    def bits(self, sequence: Sequence[int]) -> float:
        """Total surprise of a sequence in bits."""
        ids = list(sequence)
        return -sum(math.log2(self._probability(ids[max(0, i - self.order + 1) : i], ids[i])) for i in range(len(ids)))

    def _probability(self, context: list[int], token: int) -> float:
        probability = 1.0 / self.vocab_size
        for n in range(1, min(len(context) + 1, self.order) + 1):
            history = tuple(context[len(context) - n + 1 :])
            total = self._totals[n - 1].get(history, 0)
            if not total:
                break
            count = self._counts[n - 1].get((*history, token), 0)
            spread = self.discount * self._kinds[n - 1][history] / total
            probability = max(count - self.discount, 0.0) / total + spread * probability
        return probability

    @staticmethod
    def _continuations(full: Counter, n: int) -> dict[tuple[int, ...], int]:
        """How many different tokens come before each n-gram: Kneser-Ney's lower-order counts."""
        before: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        for gram in full:
            if len(gram) > n:
                before[gram[-n:]].add(gram[-n - 1])
            elif len(gram) == n:
                before[gram].add(-1)  # a document begins with it
        return {gram: len(tokens) for gram, tokens in before.items()}

    @staticmethod
    def _context_sums(counts: dict[tuple[int, ...], int]) -> tuple[dict, dict]:
        totals: Counter = Counter()
        kinds: Counter = Counter()
        for gram, count in counts.items():
            totals[gram[:-1]] += count
            kinds[gram[:-1]] += 1
        return dict(totals), dict(kinds)

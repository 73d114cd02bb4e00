"""The passages that are most about some words: Okapi BM25 by bm25s, over words and, for Chinese, character pairs."""

from __future__ import annotations

from collections.abc import Sequence

import bm25s

from tigerbot_serve.plugins.documents import Document, words


class Index:
    """An index in memory over documents."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = list(documents)
        self._bm25 = bm25s.BM25()
        self._bm25.index([words(f"{d.title} {d.text}") for d in documents], show_progress=False)

    def best(self, query: str, count: int) -> list[tuple[Document, float]]:
        """Up to `count` documents that share a word with the query, best first, with their scores."""
        asked = words(query)
        if not asked:
            return []
        places, scores = self._bm25.retrieve([asked], k=min(count, len(self._documents)), show_progress=False)
        pairs = zip(places[0].tolist(), scores[0].tolist(), strict=True)
        return [(self._documents[place], score) for place, score in pairs if score > 0]

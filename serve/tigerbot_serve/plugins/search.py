"""`search`: passages about what is doubted, from a corpus in memory and, where the spec has one, an HTTP endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote, urlsplit

from tigerbot.spec.plugins import SearchPlugin
from tigerbot_serve.ensemble.evidence import Evidence, Inquiry
from tigerbot_serve.plugins.bm25 import Index
from tigerbot_serve.plugins.documents import Document, read_documents
from tigerbot_serve.plugins.safe_http import Refused, SafeClient

EXCERPT = 400  # characters of a passage
MAX_QUERY = 200  # characters that leave the house
NEAR = 0.5  # of the best score: what scores less is about something else
MAX_QUERIES = 3


class Search:
    def __init__(self, spec: SearchPlugin) -> None:
        self.deadline_s, self._spec = spec.deadline_s, spec
        self._index = Index(read_documents(spec.corpus)) if spec.corpus else None
        self._client = _client(spec) if spec.url else None

    def look_up(self, inquiry: Inquiry) -> Sequence[Evidence]:
        found = [passage for query in queries(inquiry) for passage in self._passages(query)]
        best = max((score for _, score in found), default=0.0)
        near = {one.source: replace(one, weight=score / best) for one, score in reversed(found) if score > NEAR * best}
        here = sorted(near.values(), key=lambda one: -one.weight)[: self._spec.top]
        try:
            return [*here, *self._elsewhere(inquiry)]
        except Refused:
            if here:
                return here
            raise

    def _passages(self, query: str) -> list[tuple[Evidence, float]]:
        found = self._index.best(query, self._spec.top) if self._index else []
        return [(_quoted(document), score) for document, score in found]

    def _elsewhere(self, inquiry: Inquiry) -> list[Evidence]:
        if self._client is None or self._spec.url is None:
            return []
        words = next(iter(queries(inquiry)), "")[:MAX_QUERY]
        reply = self._client.get_json(
            self._spec.url.replace("{query}", quote(words, safe="")), timeout_s=self.deadline_s
        )
        rows = reply.get(self._spec.results) if isinstance(reply, dict) else reply
        if not isinstance(rows, list):
            raise Refused(f"has no list {self._spec.results!r}", where=self._spec.url.partition("?")[0])
        return [one for row in rows[: self._spec.top] if (one := _of_row(row)) is not None]


def queries(inquiry: Inquiry) -> list[str]:
    """What to search for: the question; then what the answer says around each doubted span, without the span."""
    found = [inquiry.question] if inquiry.question.strip() else []
    for span in inquiry.spans:
        sentence = inquiry.answer[max(0, span.start - 100) : span.start] + inquiry.answer[span.end : span.end + 100]
        if len(sentence.split()) > 2 or len(sentence) > 12:
            found.append(sentence)
    return found[:MAX_QUERIES]


def _client(spec: SearchPlugin) -> SafeClient:
    parts = urlsplit(spec.url or "")
    return SafeClient(
        spec.hosts or [parts.hostname or ""],
        schemes=spec.schemes,
        networks=spec.allow_addresses,
        ports=[parts.port] if parts.port else [],
    )


def _of_row(row: Any) -> Evidence | None:
    """A result of the endpoint; whatever is not text in it is not there."""
    if not isinstance(row, dict):
        return None
    texts = {key: value for key, value in row.items() if isinstance(value, str)}
    text = (texts.get("text") or texts.get("snippet") or "")[:EXCERPT]
    url = texts.get("url", "")[:500]
    if not text.strip():
        return None
    return Evidence("search", url or texts.get("id", "")[:100], text, 0, len(text), texts.get("title", "")[:200], url)


def _quoted(document: Document) -> Evidence:
    text = document.text[:EXCERPT]
    end = document.start + len(text)
    return Evidence("search", document.id, text, document.start, end, document.title, document.url)

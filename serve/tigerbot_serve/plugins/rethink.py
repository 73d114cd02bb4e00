"""`rethink`: articles of an encyclopaedia whose title or alias stands in the question or in what is doubted."""

from __future__ import annotations

from collections.abc import Sequence

from tigerbot.spec.plugins import RethinkPlugin
from tigerbot_serve.ensemble.evidence import Evidence, Inquiry
from tigerbot_serve.plugins.documents import Document, read_documents

EXCERPT = 400  # characters of an article
MARGIN = 80  # of them before the doubted words, where the article has those


class Rethink:
    """Articles by the names they go by, longest name first."""

    def __init__(self, spec: RethinkPlugin) -> None:
        self.deadline_s, self._top = spec.deadline_s, spec.top
        self._names: dict[str, Document] = {}
        for article in read_documents(spec.encyclopaedia):
            for name in (article.title, *article.aliases):
                if name.strip():
                    self._names.setdefault(name.strip().lower(), article)
        self._longest = max(map(len, self._names), default=0)

    def look_up(self, inquiry: Inquiry) -> Sequence[Evidence]:
        doubted = " ".join(span.text for span in inquiry.spans)
        found = dict.fromkeys([*self._named(doubted), *self._named(inquiry.question), *self._named(inquiry.answer)])
        return [self._quoted(article, inquiry) for article in list(found)[: self._top]]

    def _named(self, text: str) -> list[Document]:
        """Articles named in a text, in the order of their names in it; a name inside a longer one does not count."""
        text, found, at = text.lower(), [], 0
        while at < len(text):
            for end in range(min(len(text), at + self._longest), at, -1):
                article = self._names.get(text[at:end])
                if article is not None and _whole(text, at, end):
                    found.append(article)
                    at = end - 1
                    break
            at += 1
        return found

    def _quoted(self, article: Document, inquiry: Inquiry) -> Evidence:
        places = [article.text.find(span.text) for span in inquiry.spans]
        start = max(0, min((place for place in places if place >= 0), default=0) - MARGIN)
        text = article.text[start : start + EXCERPT]
        at = article.start + start
        return Evidence("rethink", article.id, text, at, at + len(text), article.title, article.url)


def _whole(text: str, start: int, end: int) -> bool:
    """Whether a name is not a part of a longer word. Chinese words have no visible ends."""
    before, after = text[max(0, start - 1) : start], text[end : end + 1]
    return not (_joins(before, text[start]) or _joins(text[end - 1], after))


def _joins(left: str, right: str) -> bool:
    return all(one.isascii() and one.isalnum() for one in (left, right))

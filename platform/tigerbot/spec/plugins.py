"""Plug-ins of a serve spec: what the judge may look up. A request names them; what they do stands here alone."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tigerbot.spec.parts import Count, Part, Real

Seconds = Annotated[Real, Field(gt=0, le=30)]
Few = Annotated[Count, Field(le=10)]


class SearchPlugin(Part):
    """Passages of a corpus (a JSONL or text file, or a folder of them) by BM25, and of an HTTP search endpoint.

    `url` holds `{query}`; its answer is JSON with a list of {title, text or snippet, url} under `results`. Only
    `hosts` are asked (the url's own where it is left out), never at an address that is not public, unless
    `allow_addresses` names its network.
    """

    name: Literal["search"]
    corpus: str | None = None
    url: str | None = None
    results: str = "results"
    hosts: list[str] = []
    schemes: list[Literal["http", "https"]] = ["https"]
    allow_addresses: list[str] = []
    top: Few = 3
    deadline_s: Seconds = 2.0

    @model_validator(mode="after")
    def _somewhere(self) -> SearchPlugin:
        if self.corpus is None and self.url is None:
            raise ValueError("wants corpus (a file or folder), url (a search endpoint), or both")
        if self.url is not None and "{query}" not in self.url:
            raise ValueError("url wants {query} where the words go")
        return self


class RethinkPlugin(Part):
    """An encyclopaedia, JSONL of {title, aliases, text, url}: articles whose name stands in what is doubted."""

    name: Literal["rethink"]
    encyclopaedia: str
    top: Few = 3
    deadline_s: Seconds = 1.0


class CalculatorPlugin(Part):
    """Equations in the answer, computed again."""

    name: Literal["calculator"]
    max_digits: Annotated[Count, Field(le=1000)] = 50
    deadline_s: Seconds = 1.0


PluginSpec = Annotated[SearchPlugin | RethinkPlugin | CalculatorPlugin, Field(discriminator="name")]

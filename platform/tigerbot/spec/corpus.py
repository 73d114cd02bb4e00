"""`kind: corpus`: raw text to token shards."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tigerbot.spec.parts import Count, Job, Language, Name, Part, Unit


class TokenizerSpec(Part):
    """Train one (`vocab_size`), or take the one in `path`."""

    vocab_size: Annotated[Count, Field(ge=512, le=262_144)] | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizerSpec:
        if (self.vocab_size is None) == (self.path is None):
            raise ValueError("wants exactly one of vocab_size (train one) and path (take that one)")
        return self


class CorpusSource(Part):
    """A named set of files (`path` may be a glob), or a set of the shipped demo world (`world: facts|stories|...`)."""

    name: Name
    path: str | None = None
    world: str | None = None
    lang: Language | None = None
    format: Literal["text", "chat"] = "text"
    field: str = "text"
    min_chars: int = 1
    deduplicate: bool = True
    split: Literal["train", "validation"] = "train"

    @model_validator(mode="after")
    def _one(self) -> CorpusSource:
        if (self.path is None) == (self.world is None):
            raise ValueError("wants exactly one of path and world")
        return self


class CorpusSpec(Job):
    """Raw text to token shards: `<storage>/<name>/tokenizer` and `<storage>/<name>/tokens/<source>`."""

    kind: Literal["corpus"]
    sources: Annotated[list[CorpusSource], Field(min_length=1)]
    tokenizer: TokenizerSpec
    sequence_length: Annotated[Count, Field(ge=8, le=131_072)] = 512
    max_bad_rows: Unit = 0.01
    max_row_bytes: Count = 16_000_000
    seed: int = 1

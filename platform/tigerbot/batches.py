"""What a batch of records says of each run, and how much of it fits into one call to MLflow.

Records of many runs come interleaved; a run is told at once all that the batch holds of it. Pure functions: this
module reaches no server.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Record = dict[str, Any]
Key = str

PARAM_LENGTH, TAG_LENGTH = 6000, 8000  # MLflow's own limits, in characters
_ENTITIES, _PARAMS, _TAGS = 1000, 100, 100  # a call
_BYTES = 500_000  # a call; MLflow refuses 1 MB


class Point(NamedTuple):
    """One value of a metric. `at` is in ms."""

    name: str
    value: float
    at: int
    step: int


@dataclass
class Said:
    """What a batch says of one run. `end`: its last word, unless the run went on after that."""

    start: Record | None = None
    params: dict[str, str] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    end: Record | None = None


@dataclass(frozen=True)
class Chunk:
    """What one call takes."""

    params: list[tuple[str, str]] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    tags: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.params) + len(self.points) + len(self.tags)

    def halves(self) -> tuple[Chunk, Chunk]:
        cut = len(self) // 2
        return self._part(0, cut), self._part(cut, len(self))

    def _part(self, begin: int, end: int) -> Chunk:
        parts, before = [], 0
        for entities in (self.params, self.points, self.tags):
            parts.append(entities[max(0, begin - before) : max(0, end - before)])
            before += len(entities)
        return Chunk(*parts)


def gathered(records: Iterable[Record]) -> tuple[dict[Key, Said], list[Record]]:
    """What is said of each run, in the order they appear, and the registrations, which keep their own order."""
    runs: dict[Key, Said] = {}
    registered = []
    for record in records:
        op = record["op"]
        if op == "register":
            registered.append(record)
            continue
        said = runs.setdefault(record["run"], Said())
        if op == "start":
            said.start = said.start or record
            said.params = record["params"] | said.params  # the first value stands
            said.end = None
        elif op == "log":
            at, step = record["at"], record["step"]
            said.points += [Point(name, value, at, step) for name, value in record["metrics"].items()]
        elif op == "tag":
            said.tags |= record["tags"]
        elif op == "artifact":
            said.artifacts.append(record["path"])
        elif op == "finish":
            said.end = record
    return runs, registered


def new_points(points: Iterable[Point], last_steps: dict[str, int]) -> list[Point]:
    """The points behind the last step of their metric; each step of a metric once, the first value of it."""
    last, new = dict(last_steps), []
    for point in points:
        if point.name not in last or point.step > last[point.name]:
            last[point.name] = point.step
            new.append(point)
    return new


def chunks(params: dict[str, str], points: Iterable[Point], tags: dict[str, str]) -> Iterator[Chunk]:
    """Calls that together say all of it, in order."""
    chunk, size = Chunk(), 0
    kinds = (("params", params.items(), _PARAMS), ("points", points, _ENTITIES), ("tags", tags.items(), _TAGS))
    for kind, entities, most in kinds:
        for entity in entities:
            bytes_ = 100 + 6 * sum(len(part) for part in entity[:2] if isinstance(part, str))  # JSON escapes: \u....
            if len(chunk) == _ENTITIES or len(getattr(chunk, kind)) == most or (len(chunk) and size + bytes_ > _BYTES):
                yield chunk
                chunk, size = Chunk(), 0
            getattr(chunk, kind).append(entity)
            size += bytes_
    if len(chunk):
        yield chunk


def fitted(value: object, length: int) -> str:
    """A value as text that MLflow keeps whole: it would cut a long one, and two that differ would look the same."""
    text = str(value)
    if len(text) <= length:
        return text
    mark = f"... sha256:{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]}"
    return text[: length - len(mark)] + mark

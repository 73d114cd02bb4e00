"""What a run found, as numbers for a file and as a table for a reader. Latencies are of whole answers only."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tigerbot_serve.bench.plan import Plan
from tigerbot_serve.bench.reading import Sample

LATE_S = 0.05


@dataclass(frozen=True)
class Spread:
    """Percentiles in milliseconds."""

    p50: float
    p90: float
    p95: float
    p99: float
    mean: float
    max: float
    count: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Spread | None:
        found = sorted(1000 * value for value in seconds)
        if not found:
            return None
        p50, p90, p95, p99 = (percentile(found, q) for q in (50, 90, 95, 99))
        return cls(p50, p90, p95, p99, sum(found) / len(found), found[-1], len(found))


@dataclass(frozen=True)
class Report:
    """
    Attributes:
        first_event: until the first server-sent event, or the first byte of an answer that is no stream.
        first_token: until the first piece of text of a stream.
        per_token: between the tokens of one answer after its first, its mean.
        late: how late requests were sent: above a few milliseconds the machine that measures was too slow.
    """

    url: str
    loop: str
    asked: float
    stream: bool
    wall_s: float
    requests: int
    good: int
    unfinished: int
    requests_per_s: float
    tokens: int
    tokens_per_s: float
    first_event: Spread | None
    first_token: Spread | None
    per_token: Spread | None
    total: Spread | None
    late: Spread | None
    errors: dict[str, int] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return {"format_version": 1, "unit": "ms", **asdict(self)}


def report(plan: Plan, samples: Sequence[Sample], unfinished: int) -> Report:
    """Sum a run up."""
    good = [sample for sample in samples if not sample.error]
    wall_s = max((sample.end for sample in samples), default=0.0)
    tokens = sum(sample.tokens for sample in good)
    return Report(
        url=plan.url,
        loop=plan.loop,
        asked=plan.clients or plan.rate,
        stream=plan.stream,
        wall_s=wall_s,
        requests=len(samples),
        good=len(good),
        unfinished=unfinished,
        requests_per_s=len(good) / wall_s if wall_s else 0.0,
        tokens=tokens,
        tokens_per_s=tokens / wall_s if wall_s else 0.0,
        first_event=Spread.of(sample.event - sample.due for sample in good if sample.event is not None),
        first_token=Spread.of(sample.token - sample.due for sample in good if sample.token is not None),
        per_token=Spread.of(_per_token(good)),
        total=Spread.of(sample.end - sample.due for sample in good),
        late=Spread.of(sample.sent - sample.due for sample in samples),
        errors=dict(Counter(sample.error for sample in samples if sample.error).most_common()),
    )


def lines(found: Report) -> list[str]:
    """The report for a terminal."""
    asked = f"{found.asked:g} clients" if found.loop == "closed" else f"{found.asked:g} requests/s, Poisson"
    text = [
        f"{found.url}  {found.loop} loop, {asked}, {'streamed' if found.stream else 'whole answers'}",
        f"{found.good} of {found.requests} answered in {found.wall_s:.1f} s: "
        f"{found.requests_per_s:.1f} requests/s, {found.tokens_per_s:.1f} tokens/s",
        f"{'ms':<14}{'p50':>10}{'p90':>10}{'p95':>10}{'p99':>10}{'max':>10}",
    ]
    rows = {
        "first event": found.first_event,
        "first token": found.first_token,
        "per token": found.per_token,
        "total": found.total,
    }
    for name, spread in rows.items():
        if spread is not None:
            values = (spread.p50, spread.p90, spread.p95, spread.p99, spread.max)
            text.append(f"{name:<14}" + "".join(f"{value:>10.2f}" for value in values))
    text += [f"error: {kind}: {number}" for kind, number in found.errors.items()]
    if found.unfinished:
        text.append(f"stopped with {found.unfinished} under way; they are not counted")
    if found.loop == "open" and found.late is not None and found.late.p99 > 1000 * LATE_S:
        text.append(
            f"requests left {found.late.p99:.0f} ms late at p99 (counted in every time above): "
            "too few connections (--max-in-flight), or this machine is too slow (--processes)"
        )
    return text


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-th percentile of values in order, linear between neighbours."""
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _per_token(good: Iterable[Sample]) -> Iterable[float]:
    for sample in good:
        if sample.token is not None and sample.last is not None and sample.tokens > 1 and sample.last > sample.token:
            yield (sample.last - sample.token) / (sample.tokens - 1)

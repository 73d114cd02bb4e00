"""What the gateway and its engine do, for Prometheus. Each app has its own registry: two in one process do not mix.

A request is counted once, when it has ended; what the engine holds is asked when Prometheus comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tigerbot_serve.gateway.recent import TENTHS, Outcomes, Recent, Weights
from tigerbot_serve.gateway.visit import Visit

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
_UNIT = tuple(tenth / TENTHS for tenth in range(1, TENTHS + 1))
WINDOW_S = 300.0
_COUNTED = {"tokens_decoded": "Tokens decoded by the engine.", "steps": "Steps of the engine."}


class Metrics:
    """Counters and histograms of one replica.

    Args:
        stats: the engine's, as an object of numbers.
        dropped: audit lines that were lost.
    """

    def __init__(self, stats: Callable[[], Any], dropped: Callable[[], int]) -> None:
        registry = self.registry = CollectorRegistry()
        registry.register(_Engine(stats, dropped))
        self._weights, self._recent = Weights(), Recent(WINDOW_S)
        registry.register(_TokenWeights(self._weights))

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, about, buckets=buckets, registry=registry)

        self._requests = Counter("tiger_requests", "Requests that ended.", ["route", "status"], registry=registry)
        tokens = Counter("tiger_tokens", "Tokens of requests that ended.", ["kind"], registry=registry)
        self._tokens = {kind: tokens.labels(kind) for kind in ("prompt", "completion", "draft", "judge")}
        self._verdicts = Counter("tiger_verdicts", "Verdicts on held answers.", ["verdict"], registry=registry)
        self._rewrites = Counter("tiger_rewrites", "Rewrites that were tried.", registry=registry)
        self._seconds = histogram("tiger_request_seconds", "Whole requests that were answered.", _SECONDS)
        self._first = histogram("tiger_time_to_first_token_seconds", "From request to first token.", _SECONDS)
        self._each = histogram("tiger_time_per_token_seconds", "Between tokens, a request's mean.", _TOKEN_SECONDS)
        self._w = histogram("tiger_w", "Creative weight, an answer's mean.", _UNIT)
        self._by_status: dict[tuple[str, int], Any] = {}  # looking a child up costs more than counting it

    def count(self, visit: Visit) -> None:
        """A request has ended."""
        place = (visit.route, visit.status)
        child = self._by_status.get(place)
        if child is None:
            child = self._by_status[place] = self._requests.labels(visit.route, str(visit.status))
        child.inc()
        if not visit.summaries:
            return
        tokens = visit.tokens
        self._tokens["prompt"].inc(tokens.prompt)
        self._tokens["completion"].inc(tokens.completion)
        if tokens.draft or tokens.judge:
            self._tokens["draft"].inc(tokens.draft)
            self._tokens["judge"].inc(tokens.judge)
        self._seconds.observe(visit.ended - visit.began)
        if visit.first_token is not None and visit.last_token is not None:
            self._first.observe(visit.first_token - visit.began)
            if visit.seen > 1 and not visit.judged:  # the tokens of a held answer come all at once
                self._each.observe((visit.last_token - visit.first_token) / (visit.seen - 1))
        judged = visit.summaries if visit.judged else ()
        for summary in visit.summaries:
            self._w.observe(summary.w_mean)
        for summary in judged:
            self._verdicts.labels(summary.verdict).inc()
            self._rewrites.inc(summary.rewrites)
        self._weights.merge(visit.weights)
        self._recent.count(
            visit.weights, [summary.verdict for summary in judged], sum(summary.rewrites for summary in judged)
        )

    def recent(self) -> Outcomes:
        """What answers of the last five minutes came to."""
        return self._recent.reading()

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)


class _TokenWeights(Collector):
    """One histogram filled a request at a time: observing every token would cost more than decoding some."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def collect(self) -> Iterable[Metric]:
        below = [*accumulate(self._weights.counts)]
        buckets = [(str(edge), count) for edge, count in zip(_UNIT, below, strict=True)]
        yield HistogramMetricFamily(
            "tiger_token_w",
            "Creative weight of every token that was given.",
            buckets=[*buckets, ("+Inf", below[-1])],
            sum_value=self._weights.total,
        )


class _Engine(Collector):
    def __init__(self, stats: Callable[[], Any], dropped: Callable[[], int]) -> None:
        self._stats, self._dropped = stats, dropped

    def collect(self) -> Iterable[Metric]:
        for name, value in vars(self._stats()).items():
            if name in _COUNTED:
                yield CounterMetricFamily(f"tiger_{name}", _COUNTED[name], value=value)
            elif isinstance(value, int | float):
                yield GaugeMetricFamily(f"tiger_{name}", f"{name} of the engine now.".replace("_", " "), value=value)
        yield CounterMetricFamily("tiger_audit_dropped", "Audit lines that were lost.", value=self._dropped())

"""A request as OpenTelemetry spans: admit, prefill, decode, judge, respond. Off unless asked for.

Spans are made when a request has ended, from the moments its visit noted, so that nothing is traced while it is decoded.
They carry counts and names of ours, never text. A `traceparent` header makes them part of the caller's trace.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tigerbot.errors import InputError
from tigerbot.spec import ServeSpec
from tigerbot_serve.gateway.rotating import append
from tigerbot_serve.gateway.visit import Visit

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_FILE_BYTES, _FILES_KEPT = 64_000_000, 2

# What goes on after a mark, until the next one. The tokens of a held answer come all at once, after the judge.
_STREAMED = {"admitted": "prefill", "first_token": "decode", "finished": "respond"}
_HELD = {"admitted": "wait", "draft": "decode", "judge": "judge", "rewrite": "rewrite", "finished": "respond"}


class Traces:
    """Spans of ended requests, exported by a thread of the library."""

    def __init__(self, exporter: SpanExporter, service: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tigerbot")
        self._propagator = TraceContextTextMapPropagator()

    def tell(self, visit: Visit) -> None:
        """Make the spans of a visit that has ended."""
        if not visit.marks:
            return
        carrier = {"traceparent": visit.traceparent} if visit.traceparent else {}
        root = self._tracer.start_span(
            visit.route,
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=_attributes(visit),
            start_time=_epoch_ns(visit, visit.began),
        )
        if visit.status >= 500:
            root.set_status(Status(StatusCode.ERROR, visit.code))
        inside = set_span_in_context(root)
        for name, start, end in spans_of(visit):
            span = self._tracer.start_span(name, context=inside, start_time=_epoch_ns(visit, start))
            span.end(_epoch_ns(visit, end))
        root.end(_epoch_ns(visit, visit.ended))

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()


def traces_of(spec: ServeSpec, folder: Path | None) -> Traces | None:
    """Where the environment or the spec want traces to go; None where they want none.

    Raises:
        InputError: the exporter for OTLP is not installed.
    """
    exporter = _exporter(spec, folder)
    return Traces(exporter, spec.name) if exporter is not None else None


def spans_of(visit: Visit) -> list[tuple[str, float, float]]:
    """Name, begin and end of what a request went through."""
    names = _HELD if visit.judged else _STREAMED
    found, name, since = [], "admit", visit.began
    for mark, moment in visit.marks:
        if mark not in names or names[mark] == name:
            continue
        found.append((name, since, moment))
        name, since = names[mark], moment
    return [*found, (name, since, visit.ended)]


def _exporter(spec: ServeSpec, folder: Path | None) -> SpanExporter | None:
    if any(os.environ.get(name) for name in _ENDPOINTS):
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # pyright: ignore[reportMissingImports]
                OTLPSpanExporter,
            )
        except ImportError:
            raise InputError(
                "is set, but the exporter is not installed",
                where="OTEL_EXPORTER_OTLP_ENDPOINT",
                fix="pip install opentelemetry-exporter-otlp-proto-http, or unset it",
            ) from None
        return OTLPSpanExporter()
    if spec.access.traces == "console" or (spec.access.traces == "file" and folder is None):
        return ConsoleSpanExporter(formatter=_line)
    if spec.access.traces == "file" and folder is not None:
        return _FileExporter(folder / "traces" / f"{os.uname().nodename}-{os.getpid()}.jsonl")
    return None


class _FileExporter(SpanExporter):
    def __init__(self, path: Path) -> None:
        self._path = path

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            append(self._path, "".join(map(_line, spans)), max_bytes=_FILE_BYTES, keep=_FILES_KEPT)
        except OSError:
            return SpanExportResult.FAILURE
        return SpanExportResult.SUCCESS


def _line(span: ReadableSpan) -> str:
    return f"{span.to_json(indent=None)}\n"


def _attributes(visit: Visit) -> dict[str, Any]:
    tokens = visit.tokens
    return {
        "http.route": visit.route,
        "http.response.status_code": visit.status,
        "tiger.request_id": visit.request_id,
        "gen_ai.usage.input_tokens": tokens.prompt,
        "gen_ai.usage.output_tokens": tokens.completion + tokens.draft,
        "tiger.judge_tokens": tokens.judge,
    } | ({"tiger.verdict": visit.summaries[0].verdict} if visit.summaries else {})


def _epoch_ns(visit: Visit, moment: float) -> int:
    return int((visit.epoch + moment - visit.began) * 1e9)

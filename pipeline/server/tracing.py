"""Tells OpenTelemetry of requests, where a collector is named or the process is instrumented."""

from __future__ import annotations

import sys
import time
from typing import Any

from bertile.base.errors import require
from bertile.server.call import Call
from bertile.server.errors import Refusal

NAME = "bertile"


class Tracing:
    """A span a request, with its times as attributes, below the span of who asks."""

    def __init__(self, tracer: Any) -> None:
        (self._trace, self._propagate) = require(
            "trace", "opentelemetry.trace", "opentelemetry.propagate"
        )
        self._tracer = tracer

    def tell(
        self, call: Call, route: str, status: int, refusal: Refusal | None, seconds: float
    ) -> None:
        """Tell of a request that is answered, `seconds` after its body came."""
        end = time.time_ns()
        carrier = {name.decode("latin-1"): v.decode("latin-1") for name, v in call.headers.items()}
        attributes: dict[str, Any] = {
            "http.request.method": call.scope["method"],
            "http.route": route,
            "url.path": call.scope["path"],
            "http.response.status_code": status,
            "http.request.header.x-request-id": call.identity.decode(),
        }
        work = call.work
        if work is not None:
            count = len(work.texts)
            attributes |= {
                "model": call.served.name,
                "compute_chars": work.characters,
                "compute_tokens": work.tokens,
                "total_time": seconds,
                "tokenization_time": work.tokenized_seconds / count,
                "queue_time": work.queue_seconds / count,
                "inference_time": work.inference_seconds / count,
            }
        span = self._tracer.start_span(
            f"{call.scope['method']} {route}",
            context=self._propagate.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes=attributes,
            start_time=end - int(seconds * 1e9),
        )
        if refusal is not None and status >= 500:
            span.set_status(self._trace.StatusCode.ERROR, refusal.message)
        span.end(end_time=end)


def tracing(endpoint: str | None) -> Tracing | None:
    """What tells the collector at `endpoint`, a URL of OTLP over HTTP, of requests.

    Without one, the provider that this process has already, as `opentelemetry-instrument` sets one
    up; None without that. MissingExtraError where the packages are missing.
    """
    if endpoint is not None:
        trace, sdk, export, otlp = require(
            "trace",
            "opentelemetry.trace",
            "opentelemetry.sdk.trace",
            "opentelemetry.sdk.trace.export",
            "opentelemetry.exporter.otlp.proto.http.trace_exporter",
        )
        provider = sdk.TracerProvider()
        exporter = otlp.OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        provider.add_span_processor(export.BatchSpanProcessor(exporter))
        return Tracing(provider.get_tracer(NAME))
    if "opentelemetry.sdk.trace" not in sys.modules:  # else somebody has set it up
        return None
    (trace,) = require("trace", "opentelemetry.trace")
    return Tracing(trace.get_tracer(NAME))

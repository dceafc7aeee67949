"""OpenTelemetry is told of each request, below the span of whoever asks."""

from __future__ import annotations

import pytest

trace = pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra trace")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")


def test_each_request_is_a_span_below_that_of_who_asks(serve, monkeypatch) -> None:
    from opentelemetry import trace as api
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    exporter, provider = memory.InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(api, "get_tracer", provider.get_tracer)
    client = serve("dense")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client.post("/embed", json={"inputs": ["the cat", "a"]}, headers={"traceparent": parent})
    client.post("/embed", json={"inputs": ""})
    embedded, refused = exporter.get_finished_spans()
    assert embedded.name == refused.name == "POST /embed"
    assert f"{embedded.parent.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{embedded.parent.span_id:016x}" == "b7ad6b7169203331"
    said = embedded.attributes
    assert (said["model"], said["compute_tokens"], said["compute_chars"]) == ("dense", 7, 8)
    took = (embedded.end_time - embedded.start_time) / 1e9
    assert said["total_time"] == pytest.approx(took, abs=1e-6)
    assert 0 < said["inference_time"] <= took
    assert refused.parent is None and refused.attributes["http.response.status_code"] == 400


def test_collector_is_told_where_one_is_named() -> None:
    import http.server
    import threading

    from bertile.server.call import Call
    from bertile.server.tracing import tracing

    came: list[str] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            came.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        traces = tracing(f"http://127.0.0.1:{server.server_port}")
        scope = {"method": "GET", "path": "/info", "headers": []}
        traces.tell(Call(scope, None), "/info", 200, None, 0.001)
        traces._tracer.span_processor.force_flush()
        server.shutdown()
    assert came == ["/v1/traces"]

"""The HTTP endpoint of an OTLP collector in the test's own process."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class OtlpReceiver:
    """A collector's HTTP endpoint: decodes the posts to /v1/traces and holds their spans."""

    def __init__(self) -> None:
        self.spans: list[tuple[dict[str, Any], Any]] = []
        #: Headers of each post, names in lower case.
        self.headers: list[dict[str, str]] = []
        self.arrived = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                receiver.headers.append({k.lower(): v for k, v in self.headers.items()})
                receiver.take(ExportTraceServiceRequest.FromString(raw))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        with self.arrived:
            for resource_spans in request.resource_spans:
                resource = read_attributes(resource_spans.resource.attributes)
                for scope in resource_spans.scope_spans:
                    self.spans.extend((resource, span) for span in scope.spans)
            self.arrived.notify_all()

    def trace(self, trace_id: str, expected: int, timeout_s: float = 20.0) -> list[Any]:
        """The spans of one trace, once there are as many as expected; (resource, span) pairs."""

        def spans_of_trace() -> list[Any]:
            return [pair for pair in self.spans if pair[1].trace_id.hex() == trace_id]

        with self.arrived:
            self.arrived.wait_for(lambda: len(spans_of_trace()) >= expected, timeout_s)
            return spans_of_trace()


def read_attributes(pairs: Any) -> dict[str, Any]:
    """OTLP key-value pairs as a dict of plain values."""
    return {pair.key: _plain(pair.value) for pair in pairs}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(item) for item in value.array_value.values]
    return getattr(value, kind)

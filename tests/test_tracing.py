"""OpenTelemetry traces, as a collector gets them: real protobuf over real HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from server_fixtures import MODEL, RunningServer, events, serve, tiny_engine, wait_until

from stallfree.engine.async_engine import AsyncEngine
from stallfree.engine.settings import ServerSettings
from stallfree.errors import ConfigError
from stallfree.server.app import create_app

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs the extra otel")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

SECRET = "Würde brown fox"
BODY: dict[str, Any] = {"model": MODEL, "prompt": SECRET, "max_tokens": 4, "ignore_eos": True}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """Receives traces at `url`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        self.bodies: list[bytes] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                assert self.headers["content-type"] == "application/x-protobuf"
                outer.take(body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resource = attributes(resource.resource.attributes)
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def of(self, request_id: str) -> tuple[Span, dict[str, Span]]:
        """The span of a request, and those in it by name."""

        def found() -> list[Span]:
            return [
                span
                for span in list(self.spans)
                if attributes(span.attributes).get("stallfree.request_id") == request_id
            ]

        wait_until(lambda: bool(found()))
        (span,) = found()
        children = {each.name: each for each in self.spans if each.parent_span_id == span.span_id}
        return span, children

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: plain(pair.value) for pair in pairs}


def plain(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(each) for each in value.array_value.values]
    return getattr(value, str(kind))


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[RunningServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")  # milliseconds
        with serve(
            tiny_engine(tmp_path_factory.mktemp("otel")), otlp_endpoint=collector.url
        ) as running:
            yield running


def test_a_completion_has_a_span_of_each_phase(server: RunningServer, collector: Collector) -> None:
    response = server.post("/v1/completions", {**BODY, "seed": 7, "temperature": 0.5, "n": 2})
    answer = response.json()
    span, children = collector.of(response.headers["X-Request-Id"])
    assert span.name == "POST /v1/completions"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert not span.parent_span_id
    assert set(children) == {"waiting", "prefill", "decode"}
    waiting, prefill, decode = (children[name] for name in ("waiting", "prefill", "decode"))
    assert waiting.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert (
        span.start_time_unix_nano
        <= waiting.start_time_unix_nano
        <= waiting.end_time_unix_nano
        < prefill.end_time_unix_nano
        < decode.end_time_unix_nano
        <= span.end_time_unix_nano
    )
    assert {each.trace_id for each in children.values()} == {span.trace_id}
    found = attributes(span.attributes)
    expected = {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "stallfree",
        "gen_ai.request.model": MODEL,
        "gen_ai.response.id": answer["id"],
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.seed": 7,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "stallfree.tier": "default",
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["stallfree.longest_gap_seconds"] > 0
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert collector.resource["service.name"] == "stallfree"


def test_a_trace_of_the_client_goes_on(server: RunningServer, collector: Collector) -> None:
    headers = {"traceparent": PARENT, "tracestate": "vendor=1"}
    chat = {"model": MODEL, "max_tokens": 3, "ignore_eos": True, "stream": True}
    chat["messages"] = [{"role": "user", "content": SECRET}]
    with server.http.stream("POST", "/v1/chat/completions", json=chat, headers=headers) as response:
        list(events(response.iter_lines()))
    span, children = collector.of(response.headers["X-Request-Id"])
    assert span.trace_id.hex() == PARENT.split("-")[1]
    assert span.parent_span_id.hex() == PARENT.split("-")[2]
    assert span.trace_state == "vendor=1"
    assert attributes(span.attributes)["gen_ai.operation.name"] == "chat"
    assert len(children) == 3


def test_a_client_that_samples_nothing_gets_nothing(
    server: RunningServer, collector: Collector
) -> None:
    unsampled = PARENT.replace("0af7", "ffff")[:-2] + "00"
    server.http.get("/health", headers={"traceparent": unsampled})
    later = server.http.get("/health")
    collector.of(later.headers["X-Request-Id"])
    assert not any(span.trace_id.hex().startswith("ffff") for span in collector.spans)


@pytest.mark.parametrize("header", ["nonsense", "00-0-0-01", PARENT + "-x", "ff" + PARENT[2:]])
def test_a_wrong_header_begins_a_trace(
    server: RunningServer, collector: Collector, header: str
) -> None:
    response = server.http.get("/health", headers={"traceparent": header})
    span, children = collector.of(response.headers["X-Request-Id"])
    assert not span.parent_span_id
    assert not children


def test_errors_are_seen(server: RunningServer, collector: Collector) -> None:
    refused = server.post("/v1/completions", {**BODY, "top_p": 7})
    span, children = collector.of(refused.headers["X-Request-Id"])
    assert attributes(span.attributes)["http.response.status_code"] == 400
    assert span.status.code == Status.STATUS_CODE_UNSET  # it is the client's
    assert not children
    nothing = server.http.request("STRANGE", "/no/such/place")
    span, _ = collector.of(nothing.headers["X-Request-Id"])
    assert span.name == "_OTHER"
    assert "http.route" not in attributes(span.attributes)


def test_a_failure_is_the_servers(
    server: RunningServer, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str | None) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(server.server._service, "check_model", broken)
    response = server.post("/v1/completions", BODY)
    span, _ = collector.of(response.headers["X-Request-Id"])
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert attributes(span.attributes)["error.type"] == "500"


def test_no_text_is_sent(server: RunningServer, collector: Collector) -> None:
    response = server.post("/v1/completions", {**BODY, "stop": ["a stop string"], "user": "me@x"})
    collector.of(response.headers["X-Request-Id"])
    sent = b"".join(collector.bodies)
    written = response.json()["choices"][0]["text"]
    for text in (SECRET, written, "a stop string", "me@x"):
        assert text.encode() not in sent


def test_the_last_spans_are_sent_when_the_server_ends(
    tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> None:
    with serve(tiny_engine(tmp_path_factory.mktemp("end")), otlp_endpoint=collector.url) as other:
        response = other.post("/v1/completions", BODY)
    collector.of(response.headers["X-Request-Id"])


def test_nobody_waits_for_a_collector_that_is_gone(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with serve(
        tiny_engine(tmp_path_factory.mktemp("gone")), otlp_endpoint="http://127.0.0.1:1"
    ) as running:
        for _ in range(5):
            assert running.post("/v1/completions", BODY).status_code == 200


def test_without_the_extra_it_says_what_to_install(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "stallfree.server.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    engine = AsyncEngine(tiny_engine(tmp_path_factory.mktemp("without")))
    with pytest.raises(ConfigError, match=r"pip install 'stallfree\[otel\]'"):
        create_app(engine, ServerSettings(otlp_endpoint="http://localhost:4318"))

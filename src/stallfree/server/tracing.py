"""OpenTelemetry traces: a span for each HTTP request, in it those of waiting, prefill and decode.

Needs the extra `otel`. Attributes follow OpenTelemetry's semantic conventions for HTTP servers and
for generative AI, as far as they fit. Spans are made when a request has ended, with the times that
were noted, so nothing is held while it runs. No text of a prompt or an answer is in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import version

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from stallfree.server.request_note import OTHER, GenerationNote, RequestNote

_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_PATH = "/v1/traces"  # below the base URL, as OTLP has it

Value = str | int | float | list[str]


class Tracing:
    """Sends spans to a collector, from a thread of its own.

    The SDK's own environment variables hold too: OTEL_SERVICE_NAME, OTEL_EXPORTER_OTLP_HEADERS,
    OTEL_TRACES_SAMPLER and so on.

    Args:
        endpoint: base URL of the collector.
        model_name: as clients name it.
        now: the clock of the notes.
    """

    def __init__(self, endpoint: str, model_name: str, now: Callable[[], float]) -> None:
        service = Resource({"service.name": "stallfree", "service.version": version("stallfree")})
        self._provider = TracerProvider(
            resource=service.merge(OTELResourceDetector().detect()), shutdown_on_exit=False
        )
        url = endpoint.rstrip("/").removesuffix(_PATH) + _PATH
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("stallfree", version("stallfree"))
        self._propagator = TraceContextTextMapPropagator()
        self._model_name = model_name
        self._now = now

    def record(self, note: RequestNote) -> None:
        """Make the spans of a request that ended, and note the id of its trace, if it is sent."""
        to_epoch_s = time.time() - self._now()

        def ns(moment: float) -> int:
            return round((moment + to_epoch_s) * 1e9)

        span = self._tracer.start_span(
            _name(note),
            context=self._propagator.extract(note.trace_headers),
            kind=SpanKind.SERVER,
            attributes=self._attributes(note),
            start_time=ns(note.started_at),
        )
        context = span.get_span_context()
        if context.is_valid and context.trace_flags.sampled:
            note.trace_id = trace.format_trace_id(context.trace_id)
        reason = None if note.generation is None else note.generation.reason
        if note.status >= 500 or reason == "error":
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", str(note.status) if note.status >= 500 else "error")
        if note.generation is not None:
            self._record_phases(span, note.generation, ns)
        span.end(end_time=ns(note.ended_at))

    def close(self) -> None:
        """Send what is left, and end the thread."""
        self._provider.shutdown()

    def _record_phases(self, span: Span, note: GenerationNote, ns: Callable[[float], int]) -> None:
        """The phases that are known: none of a request that ended before its first token."""
        if note.scheduled_at is None or note.first_token_at is None or note.last_token_at is None:
            return
        scheduled_at = max(note.arrived_at, note.scheduled_at)
        phases = (
            ("waiting", note.arrived_at, scheduled_at),
            ("prefill", scheduled_at, note.first_token_at),
            ("decode", note.first_token_at, note.last_token_at),
        )
        within = trace.set_span_in_context(span)
        for name, start, end in phases:
            child = self._tracer.start_span(name, context=within, start_time=ns(start))
            child.end(end_time=ns(end))

    def _attributes(self, note: RequestNote) -> dict[str, Value]:
        attributes: dict[str, Value] = {
            "http.request.method": _method(note),
            "http.response.status_code": note.status,
            "stallfree.request_id": note.request_id,
        }
        if note.endpoint != OTHER:
            attributes["http.route"] = note.endpoint
        operation = _OPERATIONS.get(note.endpoint)
        if operation is not None:
            attributes["gen_ai.operation.name"] = operation
            attributes["gen_ai.provider.name"] = "stallfree"
            attributes["gen_ai.request.model"] = self._model_name
        if note.generation is not None:
            attributes |= _generated(note.generation)
        return attributes


def _name(note: RequestNote) -> str:
    return _method(note) if note.endpoint == OTHER else f"{_method(note)} {note.endpoint}"


def _method(note: RequestNote) -> str:
    """The method, or what the conventions have for one that is none."""
    return note.method if note.method in _METHODS else "_OTHER"


def _generated(note: GenerationNote) -> dict[str, Value]:
    params = note.params
    attributes: dict[str, Value | None] = {
        "gen_ai.response.id": note.completion_id,
        "gen_ai.usage.input_tokens": note.num_prompt_tokens,
        "gen_ai.usage.output_tokens": note.num_output_tokens,
        "gen_ai.request.choice.count": None if note.num_choices == 1 else note.num_choices,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.response.finish_reasons": note.reasons if note.is_accepted else None,
        "stallfree.tier": note.tier,
        "stallfree.longest_gap_seconds": note.longest_gap_s,
    }
    return {name: value for name, value in attributes.items() if value is not None}

"""What a server tells of itself, put together: metrics, the log of requests, traces."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, FastAPI

from stallfree.engine.observability_settings import ObservabilitySettings
from stallfree.engine.settings import ServerSettings
from stallfree.errors import ConfigError
from stallfree.server.debug_trace import OPENAPI, DebugTrace
from stallfree.server.metrics import Metrics
from stallfree.server.request_id import RequestIds, RequestNotes
from stallfree.server.request_log import log_request
from stallfree.server.request_note import RequestNote
from stallfree.server.service import Service


class Observability:
    """Watches a service.

    Args:
        service: what is served; the engine's thread has not started.
        settings: of the server.

    Attributes:
        notes: of requests, which tell what watches of their ends.

    Raises:
        ConfigError: traces are asked for without the extra `otel`.
    """

    def __init__(self, service: Service, settings: ServerSettings) -> None:
        self._metrics = Metrics(service.engine)
        self._trace = DebugTrace(service)
        self._closers: list[Callable[[], None]] = []
        watchers: list[Callable[[RequestNote], None]] = [self._metrics.http.count]
        if settings.otlp_endpoint is not None:
            check_tracing(settings)
            from stallfree.server.tracing import Tracing

            now = service.engine.now
            tracing = Tracing(settings.otlp_endpoint, service.model_name, now)
            watchers.append(tracing.record)
            self._closers.append(tracing.close)
        watchers.append(log_request)  # after tracing, whose id it has
        self.notes = RequestNotes(service.engine.now, settings.log_prompts, watchers)

    def add_to(self, app: FastAPI, watching: APIRouter) -> None:
        """Add the routes, and the middleware, which must be outside of all other."""
        watching.add_api_route("/metrics", self._metrics.show, methods=["GET"])
        record = self._trace.record
        watching.add_api_route("/debug/trace", record, methods=["POST"], openapi_extra=OPENAPI)
        app.add_middleware(RequestIds, notes=self.notes)

    def close(self) -> None:
        """Send what is left to be sent. May take seconds."""
        for close in self._closers:
            close()


def check_tracing(settings: ObservabilitySettings) -> None:
    """Check that traces can be sent, if they are to be.

    Raises:
        ConfigError: the extra `otel` is not installed.
    """
    if settings.otlp_endpoint is None:
        return
    try:
        import stallfree.server.tracing  # noqa: F401 - it is there, which is all
    except ImportError as error:
        raise ConfigError(
            f"otlp_endpoint is {settings.otlp_endpoint}, but OpenTelemetry is not installed: "
            f"pip install 'stallfree[otel]' ({error})"
        ) from None

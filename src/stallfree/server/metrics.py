"""`/metrics`: what Prometheus scrapes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from stallfree.engine.engine import Engine
from stallfree.engine.meter import Meter
from stallfree.server.engine_metrics import EngineMetrics
from stallfree.server.request_note import RequestNote


class HttpMetrics(Collector):
    """Counts HTTP requests by endpoint and status in one thread; another may collect."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, int]] = Counter()

    def count(self, note: RequestNote) -> None:
        """Count a request that ended."""
        self._counts[note.endpoint, note.status] += 1

    def collect(self) -> Iterator[Metric]:
        """The one family, as the registry asks for it."""
        family = CounterMetricFamily(
            "stallfree_http_requests",
            "HTTP requests that ended, by the template of their path.",
            labels=("endpoint", "status"),
        )
        counts = dict(self._counts)  # copied at once, as the event loop counts on
        for (endpoint, status), count in sorted(counts.items()):
            family.add_metric((endpoint, str(status)), count)
        yield family


class Metrics:
    """All metrics of a server, in a registry of its own.

    Args:
        engine: what is served; its thread has not started.

    Attributes:
        http: to be told of each HTTP request.
    """

    def __init__(self, engine: Engine) -> None:
        meter = Meter()
        engine.observers.add(meter)
        self.http = HttpMetrics()
        self._registry = CollectorRegistry()
        self._registry.register(EngineMetrics(engine, meter))
        self._registry.register(self.http)
        ProcessCollector(registry=self._registry)

    async def show(self, request: Request) -> Response:
        """Everything that is counted, in Prometheus' text format or in that of OpenMetrics."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        text = await asyncio.to_thread(encode, self._registry)  # milliseconds, for many buckets
        return Response(text, media_type=content_type)

"""`/metrics`: what Prometheus scrapes."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from stallfree.engine.served import ReplicaState, ServedEngine
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


class ReplicaMetrics(Collector):
    """A collector of the copies of the model as the server sees them, each by its place."""

    def __init__(self, states: Sequence[ReplicaState]) -> None:
        self._states = sorted(states, key=lambda each: each.index)

    def collect(self) -> Iterator[Metric]:
        """All families, as the registry asks for them."""
        for name, text, value in _OF_REPLICAS:
            family = GaugeMetricFamily(f"stallfree_replica_{name}", text, labels=("replica",))
            for state in self._states:
                family.add_metric((str(state.index),), value(state))
            yield family


_OF_REPLICAS: tuple[tuple[str, str, Callable[[ReplicaState], float]], ...] = (
    ("ready", "Whether the copy of the model takes requests.", lambda each: each.is_ready),
    ("requests_running", "Requests that hold KV blocks.", lambda each: each.num_running),
    ("requests_waiting", "Requests that wait for admission.", lambda each: each.num_waiting),
    (
        "predicted_wait_seconds",
        "Until a new request would be read; NaN if that is not known.",
        lambda each: math.nan if each.wait_s is None else each.wait_s,
    ),
)


class Metrics:
    """All metrics of a server.

    Args:
        engine: what is served.

    Attributes:
        http: to be told of each HTTP request.
    """

    def __init__(self, engine: ServedEngine) -> None:
        self.http = HttpMetrics()
        self._engine = engine
        self._process = ProcessCollector(registry=None)

    async def show(self, request: Request) -> Response:
        """Everything that is counted, in Prometheus' text format or in that of OpenMetrics."""
        readings = await self._engine.readings()
        registry = CollectorRegistry()  # of this moment
        registry.register(EngineMetrics(readings))
        if self._engine.local is None:
            registry.register(ReplicaMetrics(self._engine.replicas))
        registry.register(self.http)
        registry.register(self._process)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        text = await asyncio.to_thread(encode, registry)  # milliseconds, for many buckets
        return Response(text, media_type=content_type)

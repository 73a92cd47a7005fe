"""What Prometheus is told of an engine, read at each scrape.

Labels have few values, all known beforehand: tiers, reasons, causes, kinds and stages. Nothing that
a client sends is one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from stallfree.core.targets import RANKS
from stallfree.engine.engine import Engine
from stallfree.engine.histogram import Histogram
from stallfree.engine.meter import Meter
from stallfree.executor.distributed import DistributedPipeline

_CAUSES = ("memory", "tier", "lost")  # of preemptions, which are all shown from the start


class EngineMetrics(Collector):
    """A collector of one engine.

    It reads what the engine's thread changes at the same time: figures of one scrape may be an
    iteration apart.

    Args:
        engine: to be read.
        meter: one of its observers.
    """

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self._engine = engine
        self._meter = meter

    def collect(self) -> Iterator[Metric]:
        """All families of metrics, as the registry asks for them."""
        yield from self._latencies()
        yield from self._requests()
        yield from self._iterations()
        yield from self._memory()
        yield _stage_seconds(self._engine)

    def _latencies(self) -> Iterator[Metric]:
        tiers = self._meter.tiers
        yield _histogram(
            "scheduling_delay_seconds",
            "From a request's arrival to its first iteration.",
            {tier: each.delay_s for tier, each in tiers.items()},
        )
        yield _histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token (TTFT).",
            {tier: each.ttft_s for tier, each in tiers.items()},
        )
        yield _histogram(
            "time_between_tokens_seconds",
            "From each token of an answer to the next (TBT, inter-token latency).",
            {tier: each.tbt_s for tier, each in tiers.items()},
        )
        yield _histogram(
            "time_per_output_token_seconds",
            "Mean time between the tokens of each answer that came to its end (TPOT).",
            {tier: each.tpot_s for tier, each in tiers.items()},
        )
        yield _histogram(
            "end_to_end_seconds",
            "From the arrival to the end of each request that was answered in full.",
            {tier: each.end_to_end_s for tier, each in tiers.items()},
        )
        yield _counter(
            "stalls",
            "Gaps between tokens over the request's own target.",
            {tier: each.num_stalls for tier, each in tiers.items()},
            "tier",
        )

    def _requests(self) -> Iterator[Metric]:
        scheduler, meter = self._engine.scheduler, self._meter
        running = Counter(request.targets.tier for request in list(scheduler.running))
        yield _gauge(
            "requests_running",
            "Requests that hold KV blocks.",
            {tier: running[tier] for tier in RANKS},
            "tier",
        )
        up_to = [0, *(scheduler.waiting.num_requests(rank) for rank in RANKS.values())]
        yield _gauge(
            "requests_waiting",
            "Requests that wait for admission.",
            {tier: max(0, up_to[rank + 1] - up_to[rank]) for tier, rank in RANKS.items()},
            "tier",
        )
        ended = CounterMetricFamily(
            "stallfree_requests_ended", "Requests that ended.", labels=("tier", "reason")
        )
        for tier, each in meter.tiers.items():
            for reason, count in each.num_ended.items():
                ended.add_metric((tier, reason.value), count)
        yield ended
        yield _counter(
            "requests_refused",
            "Requests that were not accepted, as too much waits.",
            {tier: each.num_refused for tier, each in meter.tiers.items()},
            "tier",
        )
        yield _counter(
            "preemptions",
            "Requests whose KV blocks were taken back.",
            dict.fromkeys(_CAUSES, 0) | scheduler.preemptions,
            "cause",
        )

    def _iterations(self) -> Iterator[Metric]:
        scheduler, meter = self._engine.scheduler, self._meter
        yield _counter(
            "tokens",
            "Tokens that ran: of prompts (again after a preemption), and those of answers.",
            {
                "prompt": meter.num_prompt_tokens,
                "cached": self._engine.scheduler.prefix_hits,
                "output": meter.num_output_tokens,
            },
            "kind",
        )
        yield _histogram("iteration_seconds", "Time of an iteration.", {"": meter.iteration_s})
        yield _histogram(
            "iteration_prediction_ratio",
            "Time of an iteration over the time that was predicted for it.",
            {"": meter.prediction_ratio},
        )
        yield _counter(
            "failed_iterations", "Iterations that failed.", {"": meter.num_failed_iterations}
        )
        limit = meter.token_limit
        yield _gauge(
            "token_budget_tokens",
            "Budget of the newest iteration; missing without one.",
            {} if limit is None else {"": limit},
        )
        squeezed = scheduler.budget.squeezed
        yield _counter(
            "squeezed_iterations",
            "Iterations over the latency target because prompts must go on.",
            {"": squeezed.iterations},
        )
        yield _counter(
            "squeezed_seconds",
            "How far over the target those were predicted to be, together.",
            {"": squeezed.over_s},
        )

    def _memory(self) -> Iterator[Metric]:
        pool = self._engine.scheduler.pool
        num_free = pool.num_free
        yield _gauge(
            "kv_blocks",
            "Blocks of the KV cache.",
            {"used": pool.num_blocks - num_free, "free": num_free},
            "state",
        )


def _stage_seconds(engine: Engine) -> Metric:
    """What the stages of a pipeline did; nothing if the model runs in this process."""
    family = CounterMetricFamily(
        "stallfree_stage_seconds",
        "Time of a pipeline's stages: busy, or idle by reason (pb1, pb2, pb3: batches that "
        "differ in their prefills, in having one, in their decodes; uneven; no_work).",
        labels=("stage", "kind"),
    )
    if isinstance(engine.executor, DistributedPipeline):
        for stage, use in enumerate(engine.executor.log.stages):
            family.add_metric((str(stage), "busy"), use.busy_s)
            for bubble, idle_s in use.idle_s.items():
                family.add_metric((str(stage), bubble.name.lower()), idle_s)
    return family


def _counter(name: str, text: str, values: Mapping[str, float], label: str = "") -> Metric:
    """A family by one label, or of one value, under the key ""."""
    family = CounterMetricFamily(f"stallfree_{name}", text, labels=_labels(label))
    for key, value in values.items():
        family.add_metric(_labels(key), value)
    return family


def _gauge(name: str, text: str, values: Mapping[str, float], label: str = "") -> Metric:
    family = GaugeMetricFamily(f"stallfree_{name}", text, labels=_labels(label))
    for key, value in values.items():
        family.add_metric(_labels(key), value)
    return family


def _histogram(name: str, text: str, by_tier: Mapping[str, Histogram]) -> Metric:
    """A family by tier, or of one histogram, under the key ""."""
    label = "" if "" in by_tier else "tier"
    family = HistogramMetricFamily(f"stallfree_{name}", text, labels=_labels(label))
    for tier, histogram in by_tier.items():
        bounds = [*map(str, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, histogram.cumulative(), strict=True))
        family.add_metric(_labels(tier), buckets, histogram.total)
    return family


def _labels(text: str) -> tuple[str, ...]:
    return (text,) if text else ()

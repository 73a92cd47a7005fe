"""What Prometheus is told of an engine, or of several copies of one, as read for a scrape.

Labels have few values, all known beforehand: tiers, reasons, causes, kinds and stages. Nothing that
a client sends is one. Of several copies each has its place as the label `replica`. Whoever takes
the place of a lost one counts from zero, as a server that starts anew does; rates allow for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from stallfree.engine.histogram import Histogram
from stallfree.engine.meter import TierCounts
from stallfree.engine.reading import EngineReading

_CAUSES = ("memory", "tier", "lost")  # of preemptions, which are all shown from the start

_Value = TypeVar("_Value")
_Keys = tuple[str, ...]  # values of labels


class EngineMetrics(Collector):
    """A collector of readings of one moment.

    Args:
        readings: of each copy of the model, by its place; or of one engine, by the empty string.
    """

    def __init__(self, readings: Mapping[str, EngineReading]) -> None:
        self._labels: _Keys = () if "" in readings else ("replica",)
        self._readings = [((place,) if place else (), each) for place, each in readings.items()]

    def collect(self) -> Iterator[Metric]:
        """All families of metrics, one after the other."""
        yield from self._latencies()
        yield from self._requests()
        yield from self._iterations()
        yield from self._holdings()

    def _latencies(self) -> Iterator[Metric]:
        yield self._histogram(
            "scheduling_delay_seconds",
            "From a request's arrival to its first iteration.",
            lambda each: _by_tier(each, lambda tier: tier.delay_s),
            "tier",
        )
        yield self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token (TTFT).",
            lambda each: _by_tier(each, lambda tier: tier.ttft_s),
            "tier",
        )
        yield self._histogram(
            "time_between_tokens_seconds",
            "From each token of an answer to the next (TBT, inter-token latency).",
            lambda each: _by_tier(each, lambda tier: tier.tbt_s),
            "tier",
        )
        yield self._histogram(
            "time_per_output_token_seconds",
            "Mean time between the tokens of each answer that came to its end (TPOT).",
            lambda each: _by_tier(each, lambda tier: tier.tpot_s),
            "tier",
        )
        yield self._histogram(
            "end_to_end_seconds",
            "From the arrival to the end of each request that was answered in full.",
            lambda each: _by_tier(each, lambda tier: tier.end_to_end_s),
            "tier",
        )
        yield self._counter(
            "stalls",
            "Gaps between tokens over the request's own target.",
            lambda each: _by_tier(each, lambda tier: tier.num_stalls),
            "tier",
        )

    def _requests(self) -> Iterator[Metric]:
        yield self._gauge(
            "requests_running",
            "Requests that hold KV blocks.",
            lambda each: _keyed(each.num_running),
            "tier",
        )
        yield self._gauge(
            "requests_waiting",
            "Requests that wait for admission.",
            lambda each: _keyed(each.num_waiting),
            "tier",
        )
        yield self._counter("requests_ended", "Requests that ended.", _ended, "tier", "reason")
        yield self._counter(
            "requests_refused",
            "Requests that were not accepted, as too much waits.",
            lambda each: _by_tier(each, lambda tier: tier.num_refused),
            "tier",
        )
        yield self._counter(
            "preemptions",
            "Requests whose KV blocks were taken back; swap: what is overwritten of them is kept.",
            _preemptions,
            "cause",
            "mode",
        )

    def _iterations(self) -> Iterator[Metric]:
        yield self._counter(
            "tokens",
            "Tokens that ran: of prompts (again after a preemption), and those of answers.",
            lambda each: {
                ("prompt",): each.counts.num_prompt_tokens,
                ("cached",): each.num_cached_tokens,
                ("output",): each.counts.num_output_tokens,
            },
            "kind",
        )
        yield self._histogram(
            "iteration_seconds", "Time of an iteration.", lambda each: {(): each.counts.iteration_s}
        )
        yield self._histogram(
            "iteration_prediction_ratio",
            "Time of an iteration over the time that was predicted for it.",
            lambda each: {(): each.counts.prediction_ratio},
        )
        yield self._counter(
            "failed_iterations",
            "Iterations that failed.",
            lambda each: {(): each.counts.num_failed_iterations},
        )
        yield self._gauge(
            "token_budget_tokens",
            "Budget of the newest iteration; missing without one.",
            _token_limit,
        )
        yield self._counter(
            "squeezed_iterations",
            "Iterations over the latency target because prompts must go on.",
            lambda each: {(): each.squeezed.iterations},
        )
        yield self._counter(
            "squeezed_seconds",
            "How far over the target those were predicted to be, together.",
            lambda each: {(): each.squeezed.over_s},
        )

    def _holdings(self) -> Iterator[Metric]:
        yield self._gauge(
            "kv_blocks",
            "Blocks of the KV cache.",
            lambda each: {("used",): each.num_used_blocks, ("free",): each.num_free_blocks},
            "state",
        )
        yield self._gauge(
            "swap_blocks",
            "Blocks that the swap space has room for.",
            lambda each: {("used",): each.swap.num_used, ("free",): each.swap.num_free},
            "state",
        )
        yield self._counter(
            "swapped_blocks",
            "Blocks that were copied to the swap space, and back.",
            lambda each: {("out",): each.swap.num_out, ("in",): each.swap.num_in},
            "direction",
        )
        yield self._counter(
            "stage_seconds",
            "Time of a pipeline's stages: busy, or idle by reason (pb1, pb2, pb3: batches that "
            "differ in their prefills, in having one, in their decodes; uneven; no_work).",
            _stage_seconds,
            "stage",
            "kind",
        )

    def _counter(
        self,
        name: str,
        text: str,
        values: Callable[[EngineReading], Mapping[_Keys, float]],
        *labels: str,
    ) -> Metric:
        """A family, of what `values` says of each reading by the values of `labels`."""
        family = CounterMetricFamily(f"stallfree_{name}", text, labels=(*self._labels, *labels))
        for keys, value in self._all(values):
            family.add_metric(keys, value)
        return family

    def _gauge(
        self,
        name: str,
        text: str,
        values: Callable[[EngineReading], Mapping[_Keys, float]],
        *labels: str,
    ) -> Metric:
        family = GaugeMetricFamily(f"stallfree_{name}", text, labels=(*self._labels, *labels))
        for keys, value in self._all(values):
            family.add_metric(keys, value)
        return family

    def _histogram(
        self,
        name: str,
        text: str,
        values: Callable[[EngineReading], Mapping[_Keys, Histogram]],
        *labels: str,
    ) -> Metric:
        family = HistogramMetricFamily(f"stallfree_{name}", text, labels=(*self._labels, *labels))
        for keys, histogram in self._all(values):
            bounds = [*map(str, histogram.bounds), "+Inf"]
            buckets = list(zip(bounds, histogram.cumulative(), strict=True))
            family.add_metric(keys, buckets, histogram.total)
        return family

    def _all(
        self, values: Callable[[EngineReading], Mapping[_Keys, _Value]]
    ) -> Iterator[tuple[_Keys, _Value]]:
        """What `values` says of all readings, with the values of all labels."""
        for place, reading in self._readings:
            for keys, value in values(reading).items():
                yield (*place, *keys), value


def _by_tier(reading: EngineReading, value: Callable[[TierCounts], _Value]) -> dict[_Keys, _Value]:
    return {(tier,): value(each) for tier, each in reading.counts.tiers.items()}


def _keyed(values: Mapping[str, float]) -> dict[_Keys, float]:
    return {(key,): value for key, value in values.items()}


def _ended(reading: EngineReading) -> dict[_Keys, float]:
    return {
        (tier, reason.value): count
        for tier, each in reading.counts.tiers.items()
        for reason, count in each.num_ended.items()
    }


def _preemptions(reading: EngineReading) -> dict[_Keys, float]:
    counts: dict[_Keys, float] = {}
    for cause in _CAUSES:
        num_swapped = reading.swapped.get(cause, 0)
        counts[cause, "swap"] = num_swapped
        counts[cause, "recompute"] = reading.preemptions.get(cause, 0) - num_swapped
    return counts


def _token_limit(reading: EngineReading) -> dict[_Keys, float]:
    limit = reading.counts.token_limit
    return {} if limit is None else {(): limit}


def _stage_seconds(reading: EngineReading) -> dict[_Keys, float]:
    seconds: dict[_Keys, float] = {}
    for stage, use in enumerate(reading.stages):
        seconds[str(stage), "busy"] = use.busy_s
        for bubble, idle_s in use.idle_s.items():
            seconds[str(stage), bubble.name.lower()] = idle_s
    return seconds

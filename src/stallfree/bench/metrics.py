"""The numbers of a run: percentiles of each latency, throughput, goodput, failures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from stallfree.bench.records import Record, Results

SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets of a request, in seconds; None where there is none.

    A request met them if its first token came within `ttft_s` and a share of 99 % of its gaps, all
    of them if they are fewer than 100, were within `tbt_s`.
    """

    tbt_s: float | None = None
    ttft_s: float | None = None

    def is_met(self, record: Record) -> bool:
        """Whether a request was answered within its targets, and to its end."""
        if record.failure is not None or record.end_s is None or record.ttft_s is None:
            return False
        in_time = self.ttft_s is None or record.ttft_s <= self.ttft_s
        gaps = record.gaps_s
        steady = self.tbt_s is None or not gaps or percentile(gaps, 0.99) <= self.tbt_s
        return in_time and steady


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in numbers; times in seconds. A latency that no request has is NaN.

    Attributes:
        latencies: by name (ttft, tbt, tpot, e2e, scheduling_delay, lateness), the percentiles of
            `SHARES` and the mean. `lateness` is how much later than planned requests were sent:
            what the load generator itself was behind.
        num_requests, num_answered: sent, and answered to the end.
        failures: by kind.
        duration_s: from the first sending to the last token.
        requests_per_s, output_tokens_per_s, total_tokens_per_s: of answered requests over it.
        goodput_per_s: requests that met the SLO, over the duration; None without one.
        num_good: how many those are.
    """

    latencies: Mapping[str, Mapping[str, float]]
    num_requests: int
    num_answered: int
    failures: Mapping[str, int]
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_per_s: float | None = None
    num_good: int | None = None


def summarize(results: Results, slo: Slo | None = None) -> Summary:
    """The numbers of a run."""
    records = results.records
    answered = [each for each in records if each.failure is None and each.end_s is not None]
    is_open = results.workload.clients is None
    latencies: dict[str, Iterable[float | None]] = {
        "ttft": [each.ttft_s for each in records],
        "tbt": [gap for each in records for gap in each.gaps_s],
        "tpot": [each.tpot_s for each in answered],
        "e2e": [each.end_s - each.sent_s for each in answered if each.end_s is not None],
        "scheduling_delay": [each.scheduling_delay_s for each in records],
        "lateness": [each.sent_s - each.arrival.at_s for each in records] if is_open else [],
    }
    ends = [each.token_s[-1] for each in records if each.token_s]
    start_s = min((each.sent_s for each in records), default=0.0)
    duration_s = max(ends, default=math.nan) - start_s
    per_s = 1 / duration_s if duration_s else math.nan
    output = sum(each.output_tokens or len(each.token_s) for each in answered)
    prompt = sum(each.prompt_tokens or each.arrival.prompt_tokens for each in answered)
    num_good = None if slo is None else sum(slo.is_met(each) for each in records)
    return Summary(
        latencies={name: _percentiles(values) for name, values in latencies.items()},
        num_requests=len(records),
        num_answered=len(answered),
        failures=Counter(each.failure.kind for each in records if each.failure is not None),
        duration_s=duration_s,
        requests_per_s=len(answered) * per_s,
        output_tokens_per_s=output * per_s,
        total_tokens_per_s=(output + prompt) * per_s,
        goodput_per_s=None if num_good is None else num_good * per_s,
        num_good=num_good,
    )


def _percentiles(values: Iterable[float | None]) -> dict[str, float]:
    known = sorted(value for value in values if value is not None)
    found = {name: _at(known, share) for name, share in SHARES.items()}
    found["mean"] = sum(known) / len(known) if known else math.nan
    return found


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` (0 to 1) of the values do not exceed; NaN of nothing."""
    return _at(sorted(values), share)


def num_above(count: int, share: float) -> int:
    """How many of `count` values may exceed a limit that their percentile is within."""
    return count - _rank(count, share)


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[_rank(len(ordered), share) - 1] if ordered else math.nan


def _rank(count: int, share: float) -> int:
    """Which of `count` values in their order is the percentile, from 1."""
    return min(count, max(1, math.ceil(share * count)))

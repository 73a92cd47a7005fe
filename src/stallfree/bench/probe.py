"""A probe: what one run at one rate showed, in the few numbers that any SLO is judged by.

It knows no SLO, so that one probe serves the search for several.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stallfree.bench.metrics import percentile, summarize
from stallfree.bench.records import Record, Results
from stallfree.bench.report import cpu_share

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True, slots=True)
class PrefillTimes:
    """How long a prompt is read where nothing is waited for, by its size.

    For servers that do not tell when they began with a request. Of the times to the first token,
    each size gets the least that a prompt of its size or longer had; the lower convex hull of
    these over the size is the time of reading. Times in between are on straight lines, beyond the
    longest prompt the last line goes on, and below the shortest its time is kept.

    From requests that were sent one at a time, this is the time of reading itself. From a loaded
    run it holds whatever nobody was spared, so delays are underestimated; and where prompts are
    read beside decodes, what those take counts as delay.

    Attributes:
        corners: of the hull: tokens of a prompt and seconds, both rising.
    """

    corners: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, records: Iterable[Record]) -> PrefillTimes | None:
        """From requests that had a token; None if there is none."""
        least: dict[int, float] = {}
        for record in records:
            if record.ttft_s is not None:
                size = _prompt_tokens(record)
                least[size] = min(record.ttft_s, least.get(size, math.inf))
        longer_s = math.inf
        corners: list[tuple[int, float]] = []  # from the longest prompt on
        for size in sorted(least, reverse=True):
            longer_s = min(longer_s, least[size])
            while len(corners) > 1 and not _is_convex((size, longer_s), corners[-1], corners[-2]):
                corners.pop()
            corners.append((size, longer_s))
        return cls(tuple(reversed(corners))) if corners else None

    def seconds(self, prompt_tokens: int) -> float:
        """The time of reading a prompt."""
        corners = self.corners
        if len(corners) == 1 or prompt_tokens <= corners[0][0]:
            return corners[0][1]
        place = bisect_left(corners, (prompt_tokens, 0.0))
        (left, start_s), (right, end_s) = corners[max(0, min(place, len(corners) - 1) - 1) :][:2]
        return start_s + (end_s - start_s) * (prompt_tokens - left) / (right - left)


@dataclass(frozen=True, slots=True)
class Probe:
    """One run at one rate; times in seconds.

    Attributes:
        qps: requests that were to arrive in a second, on average.
        seed: of their sizes and arrival times.
        tbt_s: quantiles of all times between tokens, by `QUANTILES`; None if there was no such
            time.
        delay_s: median time from the arrival of a request to when the server began with it; None
            if no request had a token.
        is_delay_told: whether the server told that; otherwise it was estimated by `PrefillTimes`.
        failures: requests that were not answered to their end, by kind.
        num_requests: how many were sent.
        is_complete: whether the run was not given up; one that was passes under no SLO.
        requests_per_s, output_tokens_per_s: what was answered, over the duration; None if nothing
            was.
        duration_s: from the first sending to the last token; None if there was no token.
        lateness_s: P99 of how much later than planned requests were sent; None if unknown.
        client_cpu: share of a core that the load generator used; None if unknown.
    """

    qps: float
    seed: int
    tbt_s: Mapping[float, float] | None
    delay_s: float | None
    is_delay_told: bool
    failures: Mapping[str, int]
    num_requests: int
    is_complete: bool
    requests_per_s: float | None
    output_tokens_per_s: float | None
    duration_s: float | None
    lateness_s: float | None = None
    client_cpu: float | None = None

    @classmethod
    def of(
        cls, results: Results, qps: float, seed: int, prefill: PrefillTimes | None = None
    ) -> Probe:
        """What a run showed.

        Args:
            results: the run.
            qps: see `Probe`.
            seed: see `Probe`.
            prefill: times of reading for servers that do not tell when they began with a request;
                from the run itself if None.
        """
        records = results.records
        gaps = sorted(gap for record in records for gap in record.gaps_s)
        told = [each.scheduling_delay_s for each in records if each.scheduling_delay_s is not None]
        delays = told or _estimated_delays(records, prefill)
        failures = Counter(each.failure.kind for each in records if each.failure is not None)
        if unfinished := sum(each.end_s is None and each.failure is None for each in records):
            failures["unfinished"] = unfinished
        summary = summarize(results)
        return cls(
            qps=qps,
            seed=seed,
            tbt_s={share: percentile(gaps, share) for share in QUANTILES} if gaps else None,
            delay_s=percentile(delays, 0.5) if delays else None,
            is_delay_told=bool(told),
            failures=dict(failures),
            num_requests=len(records),
            is_complete=results.is_complete,
            requests_per_s=_finite(summary.requests_per_s),
            output_tokens_per_s=_finite(summary.output_tokens_per_s),
            duration_s=_finite(summary.duration_s),
            lateness_s=_finite(summary.latencies["lateness"]["p99"]),
            client_cpu=cpu_share(results),
        )

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Probe:
        """Read what `as_json` made, after a trip through JSON.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = dict(content)
            if values["tbt_s"] is not None:
                values["tbt_s"] = {share: float(values["tbt_s"][str(share)]) for share in QUANTILES}
            for name in ("delay_s", "lateness_s", "client_cpu"):
                if values.get(name) is not None:
                    values[name] = float(values[name])
            return cls(**{**values, "qps": float(values["qps"]), "seed": int(values["seed"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"it holds no probe: {error!r}") from error


def _estimated_delays(records: Sequence[Record], prefill: PrefillTimes | None) -> list[float]:
    times = prefill or PrefillTimes.of(records)
    if times is None:
        return []
    return [
        max(0.0, each.ttft_s - times.seconds(_prompt_tokens(each)))
        for each in records
        if each.ttft_s is not None
    ]


def _prompt_tokens(record: Record) -> int:
    return record.prompt_tokens or record.arrival.prompt_tokens


def _is_convex(
    left: tuple[int, float], middle: tuple[int, float], right: tuple[int, float]
) -> bool:
    """Whether the middle one of three points is below the line through the others."""
    rise = (right[1] - left[1]) * (middle[0] - left[0])
    return (middle[1] - left[1]) * (right[0] - left[0]) < rise


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""Making a workload from the specs of its lengths and arrivals, and describing one in numbers.

Gaps and lengths have random streams of their own: changing one of the two leaves the other as it
was, and another rate gives the same requests, stretched in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from stallfree.bench.arrivals import arrival_times, parse_arrivals
from stallfree.bench.lengths import Lengths, Size, TraceLengths, parse_lengths
from stallfree.bench.metrics import percentile
from stallfree.bench.workload import Arrival, Workload
from stallfree.errors import ConfigError

DEFAULT_QPS = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a workload is made from.

    Attributes:
        lengths: spec of the lengths, see `bench/lengths.py`.
        arrivals: spec of the arrivals, see `bench/arrivals.py`; not looked at with `clients`.
        num_requests: how many.
        requests_per_s: mean rate; None is 1, or with the arrivals of a trace its own.
        clients: so many clients in a closed loop; None for an open one.
        max_total_tokens: limit of prompt and answer together; None if there is none.
        seed: of all random numbers.
        prefixes: before what the lengths give, each prompt begins with one of several texts, drawn
            at random: how many there are, and tokens of each. None for no such texts.
    """

    lengths: str
    arrivals: str = "poisson"
    num_requests: int = 100
    requests_per_s: float | None = None
    clients: int | None = None
    max_total_tokens: int | None = None
    seed: int = 0
    prefixes: tuple[int, int] | None = None

    def make(self) -> Workload:
        """The workload: always the same one.

        Raises:
            ConfigError: a spec is wrong, or the two do not go together.
        """
        lengths = parse_lengths(self.lengths)
        if self.max_total_tokens is not None:
            room = self.max_total_tokens - self._prefix_tokens
            if room < 2:
                raise ConfigError(
                    f"prefixes of {self._prefix_tokens} tokens leave no room for a prompt and an "
                    f"answer in max_total_tokens, {self.max_total_tokens}"
                )
            lengths = lengths.within(room)
        if self.clients is not None:
            return self._workload(self._draw(lengths), [0.0] * self.num_requests)
        burstiness = parse_arrivals(self.arrivals)
        if burstiness is None:
            return self._as_recorded(lengths)
        rate = DEFAULT_QPS if self.requests_per_s is None else self.requests_per_s
        gaps = Random(f"gaps {self.seed}")
        times = arrival_times(self.num_requests, rate, burstiness, gaps)
        return self._workload(self._draw(lengths), times)

    def _as_recorded(self, lengths: Lengths) -> Workload:
        if not isinstance(lengths, TraceLengths) or lengths.at_s is None:
            raise ConfigError(
                f"arrivals is 'trace', but workload is {self.lengths!r}; it must be a trace with "
                "the column arrived_at"
            )
        if self.num_requests > len(lengths.sizes):
            raise ConfigError(
                f"num_requests is {self.num_requests}, but {self.lengths!r} holds "
                f"{len(lengths.sizes)} requests"
            )
        count = self.num_requests
        made = self._workload(lengths.sizes[:count], lengths.at_s[:count])
        return made if self.requests_per_s is None else stretched(made, self.requests_per_s)

    def _draw(self, lengths: Lengths) -> list[Size]:
        random = Random(f"lengths {self.seed}")
        return [lengths.draw(random) for _ in range(self.num_requests)]

    def _workload(self, sizes: Sequence[Size], times: Sequence[float]) -> Workload:
        arrivals = [Arrival(at_s, *size) for at_s, size in zip(times, sizes, strict=True)]
        if self.prefixes is not None:
            random = Random(f"prefixes {self.seed}")
            arrivals = [self._with_prefix(each, random) for each in arrivals]
        return Workload(tuple(arrivals), self.clients, self._about())

    @property
    def _prefix_tokens(self) -> int:
        return 0 if self.prefixes is None else self.prefixes[1]

    def _with_prefix(self, arrival: Arrival, random: Random) -> Arrival:
        count, tokens = self.prefixes or (1, 0)
        return replace(
            arrival,
            prompt_tokens=arrival.prompt_tokens + tokens,
            prefix_id=int(random.random() * count),  # the same with every version of Python
            prefix_tokens=tokens,
        )

    def _about(self) -> str:
        parts = [f"{self.num_requests} requests of {self.lengths}"]
        if self.prefixes is not None:
            count, tokens = self.prefixes
            parts.append(f"after one of {count} prefixes of {tokens} tokens")
        if self.max_total_tokens is not None:
            parts.append(f"at most {self.max_total_tokens} tokens in total")
        if self.clients is not None:
            parts.append(f"{self.clients} clients")
        elif self.requests_per_s is not None or self.arrivals != "trace":
            rate = DEFAULT_QPS if self.requests_per_s is None else self.requests_per_s
            parts.append(f"{self.arrivals} arrivals at {rate:g}/s")
        else:
            parts.append("arrivals of the trace")
        return ", ".join([*parts, f"seed {self.seed}"])


def stretched(workload: Workload, requests_per_s: float) -> Workload:
    """The same requests with their times stretched to a rate, for a rate that a user wrote.

    Raises:
        ConfigError: they all arrive at once.
    """
    try:
        return workload.at_rate(requests_per_s)
    except ValueError as error:
        raise ConfigError(f"qps is {requests_per_s:g}, but {error}") from error


@dataclass(frozen=True, slots=True)
class LengthStatistics:
    """Lengths in tokens; percentiles are of the nearest rank."""

    min: int
    median: float
    p90: float
    max: int
    mean: float
    std: float
    total: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> LengthStatistics:
        """The statistics of at least one length."""
        mean = sum(lengths) / len(lengths)
        variance = sum((each - mean) ** 2 for each in lengths) / len(lengths)
        return cls(
            min=min(lengths),
            median=percentile(lengths, 0.5),
            p90=percentile(lengths, 0.9),
            max=max(lengths),
            mean=mean,
            std=math.sqrt(variance),
            total=sum(lengths),
        )


@dataclass(frozen=True, slots=True)
class WorkloadStatistics:
    """A workload in numbers.

    Attributes:
        num_requests: how many.
        duration_s: from the first arrival to the last; None in a closed loop.
        requests_per_s: the rate of this draw; None in a closed loop or if all arrive at once.
        gap_cv: standard deviation of the gaps over their mean, likewise: about 1 if poisson.
        prompt, output, total: the lengths.
    """

    num_requests: int
    duration_s: float | None
    requests_per_s: float | None
    gap_cv: float | None
    prompt: LengthStatistics
    output: LengthStatistics
    total: LengthStatistics


def statistics_of(workload: Workload) -> WorkloadStatistics:
    """The numbers of a workload of at least one request."""
    arrivals = workload.arrivals
    is_open = workload.clients is None
    duration_s = arrivals[-1].at_s - arrivals[0].at_s if is_open else 0.0
    rate, cv = None, None
    if duration_s > 0:
        gaps = [later.at_s - earlier.at_s for earlier, later in pairwise(arrivals)]
        mean = duration_s / len(gaps)
        rate = 1 / mean
        cv = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) / mean
    return WorkloadStatistics(
        num_requests=len(arrivals),
        duration_s=duration_s if is_open else None,
        requests_per_s=rate,
        gap_cv=cv,
        prompt=LengthStatistics.of([each.prompt_tokens for each in arrivals]),
        output=LengthStatistics.of([each.output_tokens for each in arrivals]),
        total=LengthStatistics.of([each.prompt_tokens + each.output_tokens for each in arrivals]),
    )

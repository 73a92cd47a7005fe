"""Capacity: the highest rate of requests at which a system keeps an SLO, and when a rate passes.

The definition is that of Sarathi-Serve, section 5: the 99th percentile of the time between tokens
is within the SLO, the median scheduling delay is at most two seconds. How it is searched for:
`capacity_search.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist, mean, stdev
from typing import Self

from stallfree.bench.probe import QUANTILES, Probe
from stallfree.bench.report import MAX_LATENESS_S
from stallfree.errors import ConfigError

_T_95 = {1: 12.706, 2: 4.303, 3: 3.182}  # of few degrees of freedom, where the series is off


@dataclass(frozen=True, slots=True)
class Criterion:
    """When a probe passes: no request failed, and both times are within their limits.

    Attributes:
        tbt_s: most seconds between tokens, at `quantile`.
        max_delay_s: most seconds of the median scheduling delay.
        quantile: one of `QUANTILES`.

    Raises:
        ConfigError: a value makes no sense.
    """

    tbt_s: float
    max_delay_s: float = 2.0
    quantile: float = 0.99

    def __post_init__(self) -> None:
        for name, value in (("tbt_s", self.tbt_s), ("max_delay_s", self.max_delay_s)):
            if not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value}; it must be finite and above 0")
        if self.quantile not in QUANTILES:
            known = ", ".join(f"{share:g}" for share in QUANTILES)
            raise ConfigError(f"quantile is {self.quantile}; it must be one of {known}")

    def is_met(self, probe: Probe) -> bool:
        """Whether a probe passes; without a time between tokens, there is none too long.

        One whose requests were sent more than `MAX_LATENESS_S` late does not, whatever its times:
        the client could not offer its rate.
        """
        if not probe.is_complete or probe.failures or probe.delay_s is None:
            return False
        if probe.lateness_s is not None and probe.lateness_s > MAX_LATENESS_S:
            return False
        is_steady = probe.tbt_s is None or probe.tbt_s[self.quantile] <= self.tbt_s
        return is_steady and probe.delay_s <= self.max_delay_s


@dataclass(frozen=True, slots=True)
class SeedCapacity:
    """Between which rates the capacity of one seed is.

    Attributes:
        seed: which.
        qps: the highest rate that passed below all that failed; None if none did, down to
            `min_qps`.
        failed_qps: the lowest rate that failed; None if none did, up to `max_qps`.
        passed_above_qps: the highest rate that passed although `failed_qps` is below it; None if
            none did. Where it is not, the capacity of this seed is less certain than it looks.
        is_settled: whether the search of this seed ended; if not, these are what it knew so far.
    """

    seed: int
    qps: float | None
    failed_qps: float | None
    passed_above_qps: float | None = None
    is_settled: bool = True

    @classmethod
    def of(cls, seed: int, known: Iterable[Probe], criterion: Criterion) -> Self:
        """What the probes of a seed say so far."""
        passed: list[float] = []
        failed: list[float] = []
        for probe in known:
            (passed if criterion.is_met(probe) else failed).append(probe.qps)
        limit = min(failed, default=math.inf)
        return cls(
            seed,
            qps=max((qps for qps in passed if qps < limit), default=None),
            failed_qps=min(failed, default=None),
            passed_above_qps=max((qps for qps in passed if qps > limit), default=None),
        )


@dataclass(frozen=True, slots=True)
class Capacity:
    """What was found for one criterion.

    Attributes:
        criterion: which.
        seeds: the capacity of each seed.
        probes: all that it is judged by, by seed and rate.
    """

    criterion: Criterion
    seeds: tuple[SeedCapacity, ...]
    probes: tuple[Probe, ...]

    @property
    def is_bounded(self) -> bool:
        """Whether each seed's search ended with a rate that passed and one that failed."""
        return all(
            each.is_settled and each.qps is not None and each.failed_qps is not None
            for each in self.seeds
        )

    @property
    def mean_qps(self) -> float | None:
        """The mean over the seeds; None unless all have a capacity that was found."""
        found = [each.qps for each in self.seeds if each.qps is not None]
        return mean(found) if self.is_bounded else None

    @property
    def interval_qps(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean, by Student's t, cut at 0; None of one seed."""
        found = [each.qps for each in self.seeds if each.qps is not None]
        if not self.is_bounded or len(found) < 2:
            return None
        half = _student_t(len(found) - 1) * stdev(found) / math.sqrt(len(found))
        return max(0.0, mean(found) - half), mean(found) + half


def _student_t(degrees: int) -> float:
    """What 95 % of Student's t are within; the series is within a third of a percent."""
    if degrees in _T_95:
        return _T_95[degrees]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3

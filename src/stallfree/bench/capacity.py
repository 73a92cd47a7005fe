"""Capacity: the highest rate of requests at which a system keeps an SLO.

The definition is that of Sarathi-Serve, section 5: the 99th percentile of the time between tokens
is within the SLO, the median scheduling delay is at most two seconds. Each seed has a search of its
own, for deciding a rate by several seeds would take as many runs at every rate, and say nothing of
how far seeds are apart. Nothing here knows how a rate is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, mean, stdev

from stallfree.bench.probe import QUANTILES, PrefillTimes, Probe
from stallfree.bench.probe_file import ProbeFile
from stallfree.bench.records import Results
from stallfree.bench.report import MAX_LATENESS_S
from stallfree.errors import ConfigError

Measure = Callable[[float, int], Results]
MIN_QPS, MAX_QPS = 0.01, 1000.0
_MAX_STEP, _NEXT_STEP = 2.0, 1.1  # of rates at all, and from the capacity of other seeds
_DIGITS = 5  # of a rate, so that it can be typed
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
class SearchSettings:
    """How a capacity is searched for.

    Attributes:
        seeds: of the runs; at least one.
        start_qps: a guess of the capacity.
        min_qps, max_qps: limits of the rates that are tried.
        precision: how far the lowest rate that failed may be above the capacity, as a share of it.
        first_step: factor from the guess to the next rate; a smaller one is for a good guess.

    Raises:
        ConfigError: a value makes no sense.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    start_qps: float = 1.0
    min_qps: float = MIN_QPS
    max_qps: float = MAX_QPS
    precision: float = 0.025
    first_step: float = _MAX_STEP

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds are {self.seeds}; there must be one, and none twice")
        if not 0 < self.min_qps <= self.start_qps <= self.max_qps < math.inf:
            raise ConfigError(
                f"start_qps is {self.start_qps}; "
                f"it must be from min_qps, {self.min_qps}, to max_qps, {self.max_qps}"
            )
        if not 0.001 <= self.precision <= 1:
            raise ConfigError(f"precision is {self.precision}; it must be from 0.001 to 1")
        if not 1.01 <= self.first_step <= _MAX_STEP:
            raise ConfigError(
                f"first_step is {self.first_step}; it must be from 1.01 to {_MAX_STEP:g}"
            )


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


class _Probes:
    """Probes that are known, and the making of more."""

    def __init__(
        self,
        measure: Measure,
        file: ProbeFile | None,
        prefill: PrefillTimes | None,
        on_probe: Callable[[Probe], None] | None,
        seeds: Sequence[int],
    ) -> None:
        self._measure = measure
        self._file = file
        self._prefill = prefill
        self._on_probe = on_probe
        self.of_seed: dict[int, list[Probe]] = {seed: [] for seed in seeds}
        for probe in file or ():
            if probe.seed in self.of_seed:
                self.of_seed[probe.seed].append(probe)

    def make(self, qps: float, seed: int) -> None:
        """Measure once more, and keep what came of it."""
        probe = Probe.of(self._measure(qps, seed), qps, seed, self._prefill)
        if self._file is not None:
            self._file.add(probe)
        self.of_seed[seed].append(probe)
        if self._on_probe:
            self._on_probe(probe)


def find_capacities(
    measure: Measure,
    criteria: Sequence[Criterion],
    settings: SearchSettings,
    file: ProbeFile | None = None,
    prefill: PrefillTimes | None = None,
    on_probe: Callable[[Probe], None] | None = None,
) -> list[Capacity]:
    """Search the capacity under each criterion; all of them judge the same probes.

    From the start, rates are doubled while they pass or halved while they fail, then the gap
    between passed and failed is halved (as a ratio) until it is within the precision. Later seeds
    start from the mean of those before, in smaller steps. Which rate is next depends on nothing
    but the probes so far, so a search that was interrupted goes on as if it had not been. A rate
    that failed counts as a limit even if a higher one passed; see `SeedCapacity`.

    Args:
        measure: runs the workload at a rate, with a seed: the same requests at every rate. It may
            give up early and return an incomplete run, but only where no criterion can be met.
        criteria: one or more.
        settings: of the search.
        file: where known probes are, and new ones go.
        prefill: see `Probe.of`.
        on_probe: called after each new probe.
    """
    probes = _Probes(measure, file, prefill, on_probe, settings.seeds)
    is_settled = False
    while not is_settled:  # probes for one criterion may open the gap of another again
        is_settled = True
        for criterion in criteria:
            for place, seed in enumerate(settings.seeds):
                before = [_bracket(s, probes.of_seed[s], criterion) for s in settings.seeds[:place]]
                while qps := _next_qps(probes.of_seed[seed], criterion, settings, before):
                    probes.make(qps, seed)
                    is_settled = False
    every = [probe for known in probes.of_seed.values() for probe in known]
    return capacities_of(every, criteria, settings)


def capacities_of(
    probes: Iterable[Probe], criteria: Sequence[Criterion], settings: SearchSettings
) -> list[Capacity]:
    """What probes say under each criterion, whether or not the search with them has ended."""
    of_seed: dict[int, list[Probe]] = {seed: [] for seed in settings.seeds}
    for probe in sorted(probes, key=lambda each: each.qps):
        if probe.seed in of_seed:
            of_seed[probe.seed].append(probe)
    every = tuple(probe for known in of_seed.values() for probe in known)
    found = []
    for criterion in criteria:
        seeds: list[SeedCapacity] = []
        for seed, known in of_seed.items():
            is_settled = _next_qps(known, criterion, settings, seeds) is None
            seeds.append(replace(_bracket(seed, known, criterion), is_settled=is_settled))
        found.append(Capacity(criterion, tuple(seeds), every))
    return found


def _bracket(seed: int, known: Iterable[Probe], criterion: Criterion) -> SeedCapacity:
    """What the probes of a seed say so far."""
    passed: list[float] = []
    failed: list[float] = []
    for probe in known:
        (passed if criterion.is_met(probe) else failed).append(probe.qps)
    limit = min(failed, default=math.inf)
    return SeedCapacity(
        seed,
        qps=max((qps for qps in passed if qps < limit), default=None),
        failed_qps=min(failed, default=None),
        passed_above_qps=max((qps for qps in passed if qps > limit), default=None),
    )


def _next_qps(
    known: Iterable[Probe],
    criterion: Criterion,
    settings: SearchSettings,
    before: Sequence[SeedCapacity],
) -> float | None:
    """The rate to try next with a seed; None if its capacity is found, or beyond the limits."""
    bracket = _bracket(0, known, criterion)
    low, high = bracket.qps or 0.0, bracket.failed_qps or math.inf
    is_found = high <= low * (1 + settings.precision)
    if is_found or low >= settings.max_qps or high <= settings.min_qps:
        return None
    found = [each.qps for each in before if each.qps is not None]
    start = _rounded(mean(found) if found else settings.start_qps)
    step = _NEXT_STEP if found else settings.first_step
    middle = math.sqrt(low * high) if low and high < math.inf else None
    if low < start < high:
        wanted = start
    elif start <= low:
        wanted = min(low * min(_MAX_STEP, step * low / start), middle or math.inf)
    else:
        wanted = max(high / min(_MAX_STEP, step * start / high), middle or 0.0)
    rounded = _rounded(min(max(wanted, settings.min_qps), settings.max_qps))
    return rounded if low < rounded < high else None


def _rounded(qps: float) -> float:
    return round(qps, _DIGITS - 1 - math.floor(math.log10(qps)))


def _student_t(degrees: int) -> float:
    """What 95 % of Student's t are within; the series is within a third of a percent."""
    if degrees in _T_95:
        return _T_95[degrees]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3

"""The search for a capacity: which rate is tried next, until the gap is small enough.

Each seed has a search of its own, for deciding a rate by several seeds would take as many runs at
every rate, and say nothing of how far seeds are apart. Nothing here knows how a rate is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from stallfree.bench.capacity import Capacity, Criterion, SeedCapacity
from stallfree.bench.probe import PrefillTimes, Probe
from stallfree.bench.probe_file import ProbeFile
from stallfree.bench.records import Results
from stallfree.errors import ConfigError

Measure = Callable[[float, int], Results]
MIN_QPS, MAX_QPS = 0.01, 1000.0
_MAX_STEP, _NEXT_STEP = 2.0, 1.1  # of rates at all, and from the capacity of other seeds
_DIGITS = 5  # of a rate, so that it can be typed


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
                before = [
                    SeedCapacity.of(s, probes.of_seed[s], criterion) for s in settings.seeds[:place]
                ]
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
            seeds.append(replace(SeedCapacity.of(seed, known, criterion), is_settled=is_settled))
        found.append(Capacity(criterion, tuple(seeds), every))
    return found


def _next_qps(
    known: Iterable[Probe],
    criterion: Criterion,
    settings: SearchSettings,
    before: Sequence[SeedCapacity],
) -> float | None:
    """The rate to try next with a seed; None if its capacity is found, or beyond the limits."""
    bracket = SeedCapacity.of(0, known, criterion)
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

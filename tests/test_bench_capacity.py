"""The search for capacity, with systems whose capacity is known in closed form."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from stallfree.bench.capacity import Capacity, Criterion
from stallfree.bench.capacity_search import SearchSettings, find_capacities
from stallfree.bench.probe import Probe
from stallfree.bench.probe_file import ProbeFile
from stallfree.bench.records import Failure, Record, Results
from stallfree.bench.workload import Arrival, Workload
from stallfree.errors import ConfigError

SERVICE_S = 0.05
Measure = Callable[[float, int], Results]


def run_of(tbt_s: float, delay_s: float = 0.0, failures: int = 0) -> Results:
    """A run whose requests all have one time between tokens and one delay."""
    arrivals = tuple(Arrival(at_s=float(n), prompt_tokens=10, output_tokens=3) for n in range(4))
    records = []
    for place, arrival in enumerate(arrivals):
        start = arrival.at_s + delay_s
        times = [start + 0.01 + tbt_s * n for n in range(3)]
        record = Record(arrival, arrival.at_s, times, times[-1], scheduled_s=start)
        if place < failures:
            record.failure = Failure("refused", "too many")
        records.append(record)
    return Results(Workload(arrivals), records, end_s=10.0)


class Queue:
    """A single server with a fixed time of service: waiting is known (M/D/1), so is capacity.

    Time between tokens rises with the share of time it is busy; `speed` differs by seed.
    """

    def __init__(self, speeds: dict[int, float] | None = None) -> None:
        self.speeds = speeds or {}
        self.calls: list[tuple[float, int]] = []

    def tbt_s(self, qps: float, seed: int) -> float:
        busy = qps * SERVICE_S / self.speeds.get(seed, 1.0)
        return 100.0 if busy >= 1 else SERVICE_S + busy * SERVICE_S / (2 * (1 - busy))

    def capacity(self, slo_s: float, seed: int = 0) -> float:
        waiting = (slo_s - SERVICE_S) * 2 / SERVICE_S
        return waiting / (1 + waiting) / SERVICE_S * self.speeds.get(seed, 1.0)

    def __call__(self, qps: float, seed: int) -> Results:
        self.calls.append((qps, seed))
        return run_of(self.tbt_s(qps, seed))


def find(
    measure: Measure,
    slo_s: float = 0.2,
    *,
    file: ProbeFile | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    start: float = 1.0,
    limits: tuple[float, float] = (0.01, 1000.0),
    precision: float = 0.025,
) -> Capacity:
    settings = SearchSettings(seeds, start, *limits, precision)
    return find_capacities(measure, [Criterion(slo_s)], settings, file)[0]


@pytest.mark.parametrize("start", [0.02, 1.0, 17.0, 900.0])
@pytest.mark.parametrize("slo_s", [0.0505, 0.06, 0.2, 2.0])
def test_the_capacity_of_a_queue_is_found(slo_s: float, start: float) -> None:
    queue = Queue()
    found = find(queue, slo_s, start=start, seeds=(0,))
    [seed] = found.seeds
    assert seed.qps is not None
    assert seed.failed_qps is not None
    assert seed.qps <= queue.capacity(slo_s) < seed.failed_qps <= 1.025 * seed.qps
    assert found.mean_qps == seed.qps
    assert found.interval_qps is None
    assert len(queue.calls) == len(set(queue.calls)) <= 20


def test_a_good_guess_needs_few_probes() -> None:
    queue = Queue()
    settings = SearchSettings((0,), 1.1 * queue.capacity(0.2), precision=0.1, first_step=1.2)
    [found] = find_capacities(queue, [Criterion(0.2)], settings)
    assert found.is_bounded
    assert len(queue.calls) <= 3


@pytest.mark.parametrize("precision", [0.001, 0.01, 0.3])
def test_the_gap_is_as_narrow_as_asked_for(precision: float) -> None:
    [seed] = find(Queue(), precision=precision, seeds=(0,)).seeds
    assert seed.qps is not None
    assert seed.failed_qps is not None
    assert seed.failed_qps <= seed.qps * (1 + precision)


def test_each_seed_has_its_capacity_and_later_ones_need_few_probes() -> None:
    rng = random.Random(3)
    queue = Queue({seed: rng.uniform(0.9, 1.1) for seed in range(6)})
    found = find(queue, seeds=tuple(range(6)))
    for each in found.seeds:
        assert each.qps is not None
        grid = (each.qps * (1 + step / 1000) for step in range(-500, 500))
        highest = max(qps for qps in grid if queue.tbt_s(qps, each.seed) <= 0.2)  # brute force
        assert each.qps == pytest.approx(highest, rel=0.026)
        assert each.passed_above_qps is None
    counts = [sum(seed == each for _, seed in queue.calls) for each in range(6)]
    assert max(counts[1:]) <= 6 < counts[0]


def test_the_interval_is_students() -> None:
    capacities = {0: 4.0, 1: 5.0, 2: 6.0}
    found = find(lambda qps, seed: run_of(9.0 if qps > capacities[seed] else 0.1), precision=0.001)
    assert found.mean_qps == pytest.approx(5, rel=0.001)
    assert found.interval_qps is not None
    half = 4.303 / math.sqrt(3)
    assert found.interval_qps == pytest.approx((5 - half, 5 + half), rel=0.005)


@pytest.mark.parametrize(("seeds", "t"), [(2, 12.706), (5, 2.776), (6, 2.571), (31, 2.042)])
def test_students_t(seeds: int, t: float) -> None:
    found = find(
        lambda qps, seed: run_of(9.0 if qps > 1 + seed % 2 else 0.1), seeds=tuple(range(seeds))
    )
    values = [each.qps for each in found.seeds if each.qps]
    spread = math.sqrt(sum((v - sum(values) / seeds) ** 2 for v in values) / (seeds - 1))
    assert found.interval_qps is not None
    assert found.mean_qps is not None
    half = found.interval_qps[1] - found.mean_qps
    assert found.interval_qps[0] == pytest.approx(max(0, found.mean_qps - half))
    assert half == pytest.approx(t * spread / math.sqrt(seeds), rel=0.004)


def test_a_median_delay_and_a_failed_request_fail_a_rate() -> None:
    [seed] = find(lambda qps, _: run_of(0.1, delay_s=2.01 if qps > 5 else 1.99), seeds=(0,)).seeds
    assert seed.qps == pytest.approx(5, rel=0.025)
    [seed] = find(lambda qps, _: run_of(0.1, failures=qps > 7), seeds=(0,)).seeds
    assert seed.qps == pytest.approx(7, rel=0.025)


def test_a_run_that_was_given_up_passes_nothing() -> None:
    def measure(qps: float, seed: int) -> Results:
        results = run_of(0.1)
        results.is_complete = qps <= 3
        return results

    [seed] = find(measure, seeds=(0,)).seeds
    assert seed.qps == pytest.approx(3, rel=0.025)


def test_limits_are_told_and_are_no_numbers() -> None:
    high = find(lambda qps, _: run_of(0.1), limits=(0.5, 33.3), seeds=(0, 1))
    assert [(each.qps, each.failed_qps) for each in high.seeds] == [(33.3, None)] * 2
    low = find(lambda qps, _: run_of(9.0), limits=(0.3, 40.0), seeds=(0, 1))
    assert [(each.qps, each.failed_qps) for each in low.seeds] == [(None, 0.3)] * 2
    for each in (high, low):
        assert not each.is_bounded
        assert each.mean_qps is None
        assert each.interval_qps is None


@pytest.mark.parametrize("stop", range(1, 16))
def test_a_search_goes_on_where_it_was_interrupted(tmp_path: Path, stop: int) -> None:
    speeds = {0: 1.0, 1: 1.03, 2: 0.96}
    whole, first, second = Queue(speeds), Queue(speeds), Queue(speeds)
    expected = find(whole)
    path = tmp_path / "state.jsonl"

    def until_it_breaks(qps: float, seed: int) -> Results:
        if len(first.calls) == stop:
            raise KeyboardInterrupt
        return first(qps, seed)

    with pytest.raises(KeyboardInterrupt):
        find(until_it_breaks, file=ProbeFile(path, {"system": "queue"}))
    found = find(second, file=ProbeFile(path, {"system": "queue"}))
    assert len(first.calls) == stop
    assert first.calls + second.calls == whole.calls
    assert found == expected
    third = Queue(speeds)
    assert find(third, file=ProbeFile(path, {"system": "queue"})) == expected
    assert not third.calls


def test_criteria_share_their_probes() -> None:
    criteria = [Criterion(0.06), Criterion(0.2), Criterion(1.0)]
    settings = SearchSettings()
    shared, single = Queue(), Queue()
    together = find_capacities(shared, criteria, settings)
    for criterion, found in zip(criteria, together, strict=True):
        assert found.criterion == criterion
        [alone] = find_capacities(single, [criterion], settings)
        assert found.mean_qps == pytest.approx(alone.mean_qps, rel=0.025)
    assert together[0].probes == together[1].probes
    assert len(set(shared.calls)) == len(shared.calls) < 0.8 * len(single.calls)


def test_another_precision_begins_with_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    find(coarse := Queue(), file=ProbeFile(path, {}), precision=0.2)
    find(fine := Queue(), file=ProbeFile(path, {}), precision=0.01, start=55.0)
    assert not set(coarse.calls) & set(fine.calls)
    assert len(fine.calls) <= 3 * 5


@pytest.mark.parametrize("seed", range(20))
def test_noise_ends_too_and_is_told(seed: int) -> None:
    rng = random.Random(seed)
    queue = Queue()

    def noisy(qps: float, seed: int) -> Results:
        queue(qps, seed)
        return run_of(queue.tbt_s(qps, seed) * rng.lognormvariate(0, 0.5))

    criteria = [Criterion(0.06), Criterion(0.1), Criterion(0.2)]
    for found in find_capacities(noisy, criteria, SearchSettings()):
        for each in found.seeds:
            own = [probe for probe in found.probes if probe.seed == each.seed]
            verdicts = [found.criterion.is_met(probe) for probe in own]
            assert [probe.qps for probe in own] == sorted(probe.qps for probe in own)
            is_noisy = any(later and not earlier for earlier, later in pairwise(verdicts))
            assert (each.passed_above_qps is not None) == is_noisy
            if each.qps and each.failed_qps:
                assert each.qps < each.failed_qps <= 1.025 * each.qps
    assert len(set(queue.calls)) == len(queue.calls) < 150


def test_probes_of_other_searches_stay_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "made" / "state.jsonl"
    find(Queue(), file=ProbeFile(path, {"system": "one"}))
    before = path.read_text()
    other = ProbeFile(path, {"system": "two"})
    assert not list(other)
    assert other.num_others == before.count('"probe"') > 10
    find(queue := Queue(), file=other)
    assert queue.calls
    assert path.read_text().startswith(before)
    assert len(list(ProbeFile(path, {"system": "one"}))) == len(queue.calls)


@pytest.mark.parametrize(
    "damage", ["{", "[]", "nonsense", '{"search": "x"}', "\xff", '{"probe": {"qps": 1}}', "null"]
)
def test_damaged_lines_are_left_out(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.jsonl"
    find(queue := Queue(), file=ProbeFile(path, {}))
    path.write_bytes(damage.encode("latin-1") + b"\n" + path.read_bytes())
    again = ProbeFile(path, {})
    assert len(list(again)) == len(queue.calls)
    assert f"line 1 of {path} is damaged" in caplog.text


def test_a_line_that_was_cut_costs_one_probe(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    expected = find(queue := Queue(), file=ProbeFile(path, {}))
    path.write_bytes(path.read_bytes()[:-20])
    assert find(again := Queue(), file=ProbeFile(path, {})) == expected
    assert again.calls == queue.calls[-1:]
    assert len(list(ProbeFile(path, {}))) == len(queue.calls)


def test_the_file_says_what_it_is_of(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    facts = {"model": "m", "tokens": {"prompt": 3}, "path": Path("a")}
    for _ in range(2):
        find(Queue(), file=ProbeFile(path, facts))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["facts"] for line in lines if "facts" in line] == [{**facts, "path": "a"}]
    assert len({line["search"] for line in lines}) == 1
    assert list(ProbeFile(path, dict(reversed(facts.items()))))


def test_a_file_that_cannot_be_written_is_refused_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read and written: Is a directory"):
        ProbeFile(tmp_path, {})


def test_probes_survive_json() -> None:
    runs = [run_of(0.1, 0.3), run_of(0.1, failures=2), Results(Workload(()), [], 0.0)]
    runs[0].is_complete = False
    for run in runs:
        probe = Probe.of(run, 1.25, 7)
        assert Probe.from_json(json.loads(json.dumps(probe.as_json()))) == probe


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Criterion(0.0), "tbt_s is 0.0; it must be finite and above 0"),
        (lambda: Criterion(0.1, math.inf), "max_delay_s is inf"),
        (lambda: Criterion(0.1, quantile=0.98), "quantile is 0.98; it must be one of 0.5, 0.9"),
        (lambda: SearchSettings(()), "there must be one"),
        (lambda: SearchSettings((1, 1)), "none twice"),
        (lambda: SearchSettings(start_qps=0.001), "start_qps is 0.001; it must be from min_qps"),
        (lambda: SearchSettings(precision=0.0), "precision is 0.0; it must be from 0.001 to 1"),
        (lambda: SearchSettings(first_step=3.0), "first_step is 3.0; it must be from 1.01 to 2"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()

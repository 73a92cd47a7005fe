"""What a run is boiled down to, and delays of servers that do not tell them."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from stallfree.bench.capacity import Criterion
from stallfree.bench.probe import PrefillTimes, Probe
from stallfree.bench.records import Failure, Record, Results
from stallfree.bench.workload import Arrival, Workload


def record(
    prompt_tokens: int, ttft_s: float, gaps_s: tuple[float, ...] = (), *, at_s: float = 0.0
) -> Record:
    times = [at_s + ttft_s]
    for gap in gaps_s:
        times.append(times[-1] + gap)
    return Record(Arrival(at_s, prompt_tokens, len(times)), at_s, times, times[-1])


def run(records: list[Record]) -> Results:
    return Results(Workload(tuple(each.arrival for each in records)), records, 100.0)


def reading_s(prompt_tokens: int) -> float:
    return 0.02 + 1e-4 * prompt_tokens + 1e-8 * prompt_tokens**2


def test_the_numbers_of_a_run() -> None:
    records = [record(10, 0.5, tuple(0.01 * n for n in range(1, 101)), at_s=2.0)]
    records += [record(10, 0.5, at_s=1.0), record(20, 0.5, at_s=3.0)]
    records[0].scheduled_s, records[1].scheduled_s = 2.3, 1.1
    records[2].failure = Failure("broken", "it ended")
    records.append(Record(Arrival(4.0, 5, 5), 4.0))
    probe = Probe.of(run(records), 0.75, 3)
    assert (probe.qps, probe.seed, probe.num_requests) == (0.75, 3, 4)
    assert probe.tbt_s is not None
    assert probe.tbt_s[0.5] == pytest.approx(0.5)
    assert probe.tbt_s[0.99] == pytest.approx(0.99)
    assert probe.tbt_s[1.0] == pytest.approx(1.0)
    assert probe.delay_s == pytest.approx(0.1)
    assert probe.is_delay_told
    assert probe.failures == {"broken": 1, "unfinished": 1}
    assert probe.duration_s == pytest.approx(2.5 + 50.5 - 1)
    assert probe.requests_per_s == pytest.approx(2 / 52)


def test_a_late_client_is_told_and_passes_nothing() -> None:
    records = [record(10, 0.1, at_s=float(place)) for place in range(3)]
    for each in records:
        each.sent_s += 0.04
    results = run(records)
    results.client_cpu_s = 30.0
    probe = Probe.of(results, 1.0, 0)
    assert probe.lateness_s == pytest.approx(0.04)
    assert probe.client_cpu == pytest.approx(0.3)
    assert Criterion(1.0).is_met(probe)
    assert Criterion(1.0).is_met(replace(probe, lateness_s=None))
    assert not Criterion(1.0).is_met(replace(probe, lateness_s=0.051))


def test_what_is_not_known_of_the_client_is_none() -> None:
    results = run([record(10, 0.1)])
    results.workload = replace(results.workload, clients=1)
    probe = Probe.of(results, 1.0, 0)
    assert (probe.lateness_s, probe.client_cpu) == (None, None)


def test_a_probe_without_what_is_known_of_the_client_is_read() -> None:
    probe = Probe.of(run([record(10, 0.1)]), 1.0, 0)
    content = json.loads(json.dumps(probe.as_json()))
    del content["lateness_s"], content["client_cpu"]
    assert Probe.from_json(content) == replace(probe, lateness_s=None)
    with pytest.raises(ValueError, match="late"):
        Probe.from_json({**content, "lateness_s": "late"})


def test_quantiles_can_be_chosen() -> None:
    probe = Probe.of(run([record(10, 0.1, tuple(0.01 * n for n in range(1, 101)))]), 1.0, 0)
    for quantile in (0.5, 0.9, 0.99, 1.0):
        assert Criterion(quantile + 0.001, quantile=quantile).is_met(probe)
        assert not Criterion(quantile - 0.001, quantile=quantile).is_met(probe)


def test_answers_of_one_token_have_no_time_that_is_too_long() -> None:
    probe = Probe.of(run([record(10, 0.1), record(10, 0.1)]), 1.0, 0)
    assert probe.tbt_s is None
    assert Criterion(0.001).is_met(probe)


def test_a_run_without_a_token_shows_nothing() -> None:
    probe = Probe.of(run([Record(Arrival(0.0, 5, 5), failure=Failure("timeout", ""))]), 1.0, 0)
    assert (probe.tbt_s, probe.delay_s, probe.duration_s) == (None, None, None)
    assert not Criterion(1.0).is_met(probe)


def test_prefill_times_are_the_lower_hull() -> None:
    times = PrefillTimes.of(
        [record(size, s) for size, s in [(100, 1.0), (100, 3.0), (200, 1.9), (300, 2.0), (50, 1.5)]]
    )
    assert times is not None
    assert times.corners == ((50, 1.0), (100, 1.0), (300, 2.0))
    expected = {10: 1.0, 50: 1.0, 75: 1.0, 100: 1.0, 200: 1.5, 300: 2.0, 400: 2.5}
    assert {size: times.seconds(size) for size in expected} == pytest.approx(expected)


def test_prefill_times_of_one_size_and_of_none() -> None:
    times = PrefillTimes.of([record(100, 2.0), record(100, 1.0)])
    assert times is not None
    assert [times.seconds(size) for size in (1, 100, 1000)] == [1.0, 1.0, 1.0]
    assert PrefillTimes.of([Record(Arrival(0.0, 5, 5))]) is None


@pytest.mark.parametrize("is_unloaded_known", [True, False])
def test_delays_are_estimated_where_they_are_not_told(is_unloaded_known: bool) -> None:
    rng = random.Random(1)
    sizes = [rng.randint(20, 4000) for _ in range(300)]
    delays = [rng.expovariate(1 / 3.0) for _ in sizes]
    records = [
        record(size, reading_s(size) + delay) for size, delay in zip(sizes, delays, strict=True)
    ]
    unloaded = [record(size, reading_s(size)) for size in range(20, 4001, 199)]
    prefill = PrefillTimes.of(unloaded) if is_unloaded_known else None
    probe = Probe.of(run(records), 1.0, 0, prefill)
    median = sorted(delays)[149]
    assert not probe.is_delay_told
    assert probe.delay_s is not None
    if is_unloaded_known:
        assert probe.delay_s == pytest.approx(median, abs=0.002)
    else:
        assert median - 0.15 < probe.delay_s <= median + 0.002


def test_the_servers_own_count_of_a_prompt_is_taken() -> None:
    known = record(10, 1.0)
    known.prompt_tokens = 40
    times = PrefillTimes.of([known])
    assert times is not None
    assert times.corners == ((40, 1.0),)

"""Giving up changes no verdict: for any run, and for whole searches on a simulated system."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallfree.bench.capacity import Capacity, Criterion
from stallfree.bench.capacity_search import SearchSettings, find_capacities
from stallfree.bench.giving_up import GiveUp
from stallfree.bench.metrics import num_above, percentile
from stallfree.bench.probe import QUANTILES, Probe
from stallfree.bench.records import Failure, Record, Results
from stallfree.bench.workload import Arrival, Workload
from stallfree.core.batch import Batch
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.sim.router import LeastWork
from stallfree.sim.simulation import simulate
from stallfree.sim.system import System


@pytest.mark.parametrize("share", QUANTILES)
@pytest.mark.parametrize("count", [1, 2, 3, 99, 100, 101, 1000])
def test_as_many_values_may_be_above_as_the_percentile_lets(count: int, share: float) -> None:
    most = num_above(count, share)
    assert percentile([1.0] * (count - most) + [9.0] * most, share) == 1.0
    if most < count:
        assert percentile([1.0] * (count - most - 1) + [9.0] * (most + 1), share) == 9.0


def test_of_nothing_none_is_above() -> None:
    assert num_above(0, 0.99) == 0


def random_run(seed: int) -> Results:
    """Requests of all lengths, some of whose times are too long; now and then one fails."""
    rng = random.Random(seed)
    long_share, late_share = rng.choice([0.0, 0.01, 0.1]), rng.choice([0.1, 0.5, 0.9])
    fails = rng.random() < 0.1
    records = []
    for place in range(rng.randint(1, 12)):
        arrival = Arrival(float(place), 10, rng.choice([1, 2, 30, 100]))
        begun_s = place + (3.0 if rng.random() < late_share else rng.choice([1.0, 2.0]))
        times = [begun_s + 0.05]
        for _ in range(arrival.output_tokens - 1):
            times.append(times[-1] + (0.5 if rng.random() < long_share else 0.1))
        records.append(Record(arrival, place, times, times[-1], begun_s))
        if fails and place % 5 == 4:
            records[-1].failure = Failure("refused", "too much waits")
    return Results(Workload(tuple(each.arrival for each in records)), records, 1e3)


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 10**6), quantile=st.sampled_from(QUANTILES))
def test_a_run_is_given_up_if_and_only_if_it_fails(seed: int, quantile: float) -> None:
    results, criterion = random_run(seed), Criterion(0.2, 2.5, quantile)
    rule = GiveUp.beyond(criterion, results.workload)
    ended = random.Random(seed).sample(results.records, len(results.records))
    given_up = [rule(record) for record in ended]
    assert any(given_up) != criterion.is_met(Probe.of(results, 1.0, 0))
    if not any(record.failure for record in ended):
        assert given_up == sorted(given_up)  # once failed, always failed


class Linear:
    """Half a millisecond a token, and ten more."""

    num_stages = 1

    def seconds(self, batch: Batch) -> Sequence[float]:
        return [0.010 + 0.0005 * batch.num_tokens]


def drawn(qps: float, seed: int) -> Workload:
    rng, arrivals, at_s = random.Random(seed), [], 0.0
    for _ in range(40):
        at_s += rng.expovariate(1.0)
        arrivals.append(Arrival(at_s, rng.randint(10, 2000), rng.randint(2, 40)))
    return Workload(tuple(arrivals)).at_rate(qps)


@pytest.mark.parametrize(
    ("policy", "targets"),
    [("sarathi", (0.03,)), ("sarathi", (0.05, 0.3)), ("vllm", (0.03, 0.3))],
)
def test_searches_find_the_same_with_and_without(policy: str, targets: tuple[float, ...]) -> None:
    own = SchedulingSettings(scheduler=policy, token_budget=128)
    system = System(lambda seed: Linear(), own, 100_000, 4096)
    criteria = [Criterion(target, 0.5) for target in targets]

    def search(gives_up: bool) -> tuple[list[Capacity], int]:
        num_iterations = 0

        def measure(qps: float, seed: int) -> Results:
            nonlocal num_iterations
            workload, replica = drawn(qps, seed), system.replica()
            rule = GiveUp.beyond(criteria[-1], workload) if gives_up else None
            done = simulate(workload, [replica], LeastWork(), give_up=rule)
            num_iterations += replica.num_iterations
            return done.results

        found = find_capacities(measure, criteria, SearchSettings((0, 1), 4.0, precision=0.3))
        return found, num_iterations

    with_it, fewer = search(gives_up=True)
    without, more = search(gives_up=False)
    assert [each.seeds for each in with_it] == [each.seeds for each in without]
    assert fewer < more
    for criterion in criteria:
        verdicts = [
            [criterion.is_met(probe) for probe in found[0].probes] for found in (with_it, without)
        ]
        assert verdicts[0] == verdicts[1]
    assert any(not probe.is_complete for probe in with_it[0].probes)
    assert all(probe.is_complete for probe in without[0].probes)

"""The fewest replicas, against trying each number."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from stallfree.bench.metrics import Slo, summarize
from stallfree.bench.workload import Arrival, Workload
from stallfree.core.batch import Batch
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.sim.plan import MAX_DELAY_S, Trial, find_replicas, keeps
from stallfree.sim.router import LeastWork
from stallfree.sim.simulation import simulate
from stallfree.sim.system import System


class Linear:
    """A millisecond a token, and twenty more."""

    num_stages = 1

    def seconds(self, batch: Batch) -> Sequence[float]:
        return [0.020 + 0.001 * batch.num_tokens]


SYSTEM = System(lambda seed: Linear(), SchedulingSettings(token_budget=128), 100_000, 4096)


def workload(qps: float, num_requests: int = 30) -> Workload:
    rng, at_s, arrivals = Random(1), 0.0, []
    for _ in range(num_requests):
        at_s += rng.expovariate(qps)
        arrivals.append(Arrival(at_s, rng.randint(100, 900), rng.randint(2, 6)))
    return Workload(tuple(arrivals))


def find(load: Workload, slo: Slo, most: int = 32) -> tuple[int | None, list[Trial]]:
    trials: list[Trial] = []
    return find_replicas(load, SYSTEM, LeastWork, slo, most, trials.append), trials


def is_enough(load: Workload, slo: Slo, replicas: int) -> bool:
    copies = [SYSTEM.replica() for _ in range(replicas)]
    return keeps(summarize(simulate(load, copies, LeastWork()).results, slo), slo)


@pytest.mark.parametrize(
    "slo", [Slo(ttft_s=1.5), Slo(ttft_s=4.0), Slo(tbt_s=0.15), Slo(tbt_s=0.15, ttft_s=2.0)]
)
@pytest.mark.parametrize("qps", [0.3, 4.0, 12.0])
def test_the_fewest_replicas_are_found(qps: float, slo: Slo) -> None:
    load = workload(qps)
    found, trials = find(load, slo)
    assert found == next(count for count in range(1, 33) if is_enough(load, slo, count))
    tried = [trial.replicas for trial in trials]
    assert len(tried) == len(set(tried)) <= 2 * (found or 1).bit_length() + 1
    for trial in trials:
        assert trial.keeps == (trial.replicas >= (found or 0))
        assert trial.summary.num_requests == 30 or not trial.is_complete
        assert trial.is_complete or not trial.keeps


def test_a_hopeless_number_is_given_up_early() -> None:
    load, slo = workload(12.0, 200), Slo(tbt_s=10.0, ttft_s=1.5)
    found, trials = find(load, slo)
    assert found is not None
    assert not trials[0].is_complete
    num_ended = trials[0].summary.num_answered
    assert num_ended < 20  # the third one that is too late decides: 1 % of 200 may be
    whole = [SYSTEM.replica()]
    simulate(load, whole, LeastWork())
    assert trials[0].summary.duration_s < whole[0].clock.now() / 5


def test_the_most_are_tried_before_it_is_given_up() -> None:
    load, slo = workload(12.0), Slo(ttft_s=1.5)
    fewest, _ = find(load, slo)
    assert fewest is not None
    assert fewest > 2
    assert find(load, slo, fewest)[0] == fewest
    found, trials = find(load, slo, fewest - 1)
    assert found is None
    assert trials[-1].replicas == fewest - 1
    found, trials = find(load, slo, 1)
    assert found is None
    assert [trial.replicas for trial in trials] == [1]


def test_what_no_number_keeps_is_none() -> None:
    assert find(workload(1.0), Slo(tbt_s=0.02))[0] is None  # an iteration takes longer


def test_without_a_target_for_the_first_token_half_are_begun_with_in_two_seconds() -> None:
    burst = Workload(tuple(Arrival(0.0, 500, 2) for _ in range(20)))
    found, trials = find(burst, Slo(tbt_s=10.0))
    assert found is not None
    delays = {each.replicas: each.summary.latencies["scheduling_delay"]["p50"] for each in trials}
    assert delays[found] <= MAX_DELAY_S < delays[1]
    assert find(burst, Slo(tbt_s=10.0, ttft_s=60.0))[0] == 1


def test_a_request_that_fails_is_not_served() -> None:
    load = Workload((Arrival(0.0, 10, 2), Arrival(0.0, 5000, 2)))
    assert find(load, Slo(tbt_s=10.0), 2)[0] is None

"""Simulation: the engine's loop on a clock that jumps, against closed forms and step by step."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallfree.bench.metrics import summarize
from stallfree.bench.records import Record
from stallfree.bench.workload import Arrival, Workload
from stallfree.core.batch import Batch, Chunk
from stallfree.core.bubbles import Bubble
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.step_time import StepTimeModel
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.sim.clock import SimulatedClock
from stallfree.sim.pipeline import SimulatedPipeline
from stallfree.sim.replica import Replica
from stallfree.sim.router import ROUTERS, LeastWork, PredictedWait, PrefixAffine, RoundRobin
from stallfree.sim.simulation import Simulation, simulate
from stallfree.sim.system import System, fitted
from stallfree.sim.times import ProfiledTimes

MODEL = StepTimeModel(0.02, (1, 512), (0.1,), 1e-8, 1e-7, 1e-5, scatter=(0.9, 1.0, 1.0, 1.05, 1.3))


class Linear:
    """Stages that take a millisecond a token, and ten more."""

    def __init__(self, num_stages: int = 1) -> None:
        self.num_stages = num_stages

    def seconds(self, batch: Batch) -> Sequence[float]:
        return [0.010 + 0.001 * batch.num_tokens] * self.num_stages


def system(num_stages: int = 1, kv_cache_tokens: int = 100_000, **scheduling: object) -> System:
    return System(
        lambda seed: Linear(num_stages),
        SchedulingSettings(**scheduling),  # type: ignore[arg-type]
        kv_cache_tokens,
        4096,
    )


def profiled(**scheduling: object) -> System:
    own = SchedulingSettings(**scheduling)  # type: ignore[arg-type]
    return System(lambda seed: ProfiledTimes(MODEL, seed), own, 20_000, 4096, known_times=MODEL)


def run(made: System, arrivals: Sequence[Arrival], clients: int | None = None) -> Simulation:
    return simulate(Workload(tuple(arrivals), clients), [made.replica()], LeastWork())


def random_arrivals(seed: int, count: int, rate: float = 2.0) -> list[Arrival]:
    rng, at_s, made = random.Random(seed), 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate)
        made.append(Arrival(at_s, rng.randint(1, 900), rng.randint(1, 60)))
    return made


def test_one_request_takes_what_its_iterations_take() -> None:
    done = run(system(token_budget=64), [Arrival(1.0, 150, 4)])
    (record,) = done.results.records
    read_s = 3 * 0.010 + 150 * 0.001  # chunks of 64, 64 and 22
    expected = [1.0 + read_s + 0.011 * n for n in range(4)]
    assert record.token_s == pytest.approx(expected)
    assert (record.sent_s, record.scheduled_s, record.end_s) == (1.0, 1.0, record.token_s[-1])
    assert (record.prompt_tokens, record.output_tokens) == (150, 4)
    assert done.replicas[0].num_iterations == 6


def test_a_long_prompt_stalls_vllm_and_not_sarathi() -> None:
    arrivals = [Arrival(0.0, 10, 100), Arrival(0.5, 2000, 2)]
    stalled = run(system(scheduler="vllm"), arrivals).results.records[0]
    steady = run(system(scheduler="sarathi", token_budget=64), arrivals).results.records[0]
    assert max(stalled.gaps_s) == pytest.approx(0.010 + 2.0 + 0.012)
    assert max(steady.gaps_s) == pytest.approx(0.010 + 0.064)


def test_an_arrival_waits_for_the_iteration_under_way() -> None:
    done = run(system(token_budget=512), [Arrival(0.0, 100, 1), Arrival(0.05, 10, 1)])
    second = done.results.records[1]
    assert second.scheduled_s == pytest.approx(0.110)
    assert second.ttft_s == pytest.approx(0.110 + 0.020 - 0.05)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    policy=st.sampled_from(["sarathi", "vllm", "orca", "faster_transformer", "simple_chunking"]),
    slo=st.booleans(),
    num_clients=st.sampled_from([None, 1, 3]),
)
def test_repeated_iterations_change_nothing(
    seed: int, policy: str, slo: bool, num_clients: int | None
) -> None:
    target = {"tbt_slo_s": 0.15} if slo and policy == "sarathi" else {}
    made = profiled(scheduler=policy, **target)

    def records(replica: Replica) -> list[tuple[object, ...]]:
        workload = Workload(tuple(random_arrivals(seed, 25)), num_clients)
        done = simulate(workload, [replica], LeastWork())
        replica.scheduler.check_integrity()
        assert replica.scheduler.pool.num_free == replica.scheduler.pool.num_blocks
        each = [(r.sent_s, r.scheduled_s, r.end_s, *r.token_s) for r in done.results.records]
        return [*each, (replica.num_iterations, replica.num_preemptions)]

    one_by_one = made.replica()
    one_by_one._repeat = lambda batch, until_s: None  # type: ignore[method-assign]
    assert records(made.replica()) == records(one_by_one)


def test_most_iterations_of_a_quiet_server_are_repeats() -> None:
    replica = profiled().replica()
    batches = 0
    submit = replica.pipeline.submit

    def counting(batch: Batch) -> None:
        nonlocal batches
        batches += 1
        submit(batch)

    replica.pipeline.submit = counting  # type: ignore[method-assign]
    simulate(Workload((Arrival(0.0, 10, 1000),)), [replica], LeastWork())
    assert replica.num_iterations == 1000
    assert batches < 5


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    policy=st.sampled_from(["sarathi", "vllm", "orca", "simple_chunking", "hybrid_only"]),
    num_stages=st.integers(1, 4),
    num_replicas=st.integers(1, 3),
    router=st.sampled_from(list(ROUTERS)),
)
def test_every_request_gets_all_its_tokens_in_order(
    seed: int, policy: str, num_stages: int, num_replicas: int, router: str
) -> None:
    arrivals = random_arrivals(seed, 20, rate=8.0)
    made = system(num_stages, kv_cache_tokens=8192, scheduler=policy)
    replicas = [made.replica() for _ in range(num_replicas)]
    done = simulate(Workload(tuple(arrivals)), replicas, ROUTERS[router]())
    assert [record.arrival for record in done.results.records] == arrivals
    for record in done.results.records:
        assert len(record.token_s) == record.arrival.output_tokens == record.output_tokens
        times = [record.sent_s, record.scheduled_s, *record.token_s]
        assert times == sorted(times)  # type: ignore[type-var]
    for replica in replicas:
        replica.scheduler.check_integrity()
        for stage in replica.pipeline.stages:
            total = stage.busy_s + sum(stage.idle_s.values())
            assert total <= done.results.end_s + 1e-6


def test_clients_of_a_closed_loop_send_the_next_when_one_is_answered() -> None:
    done = run(system(), [Arrival(0.0, 10, 3)] * 5, clients=2)
    records = done.results.records
    assert [record.sent_s for record in records[:2]] == [0.0, 0.0]
    ends = sorted(record.end_s or 0.0 for record in records)
    assert [record.sent_s for record in records[2:]] == ends[:3]
    assert math.isnan(summarize(done.results).latencies["lateness"]["p50"])


def test_what_cannot_fit_is_rejected_and_costs_nobody_else() -> None:
    done = run(system(), [Arrival(0.0, 5000, 1), Arrival(0.0, 10, 2)])
    long, short = done.results.records
    assert long.failure is not None
    assert long.failure.kind == "rejected"
    assert "4096" in long.failure.message
    assert len(short.token_s) == 2


def test_a_run_that_is_given_up_is_not_complete() -> None:
    workload = Workload(tuple(random_arrivals(0, 30)))
    done = simulate(workload, [system().replica()], LeastWork(), give_up=lambda record: True)
    assert not done.results.is_complete
    assert len(done.results.records) < 30


class Told:
    """Two stages that take what each batch in turn is told to."""

    num_stages = 2

    def __init__(self, times: Sequence[tuple[float, float]]) -> None:
        self._times = iter(times)

    def seconds(self, batch: Batch) -> Sequence[float]:
        return next(self._times)


@pytest.mark.parametrize(
    ("prefills", "times", "reason"),
    [
        ((1000, 0, 0), ((1.0, 1.0), (0.1, 0.1), (0.1, 0.1)), Bubble.PB2),
        ((1000, 500, 500), ((1.0, 1.0), (0.5, 0.5), (0.5, 0.5)), Bubble.PB1),
        ((0, 0, 0), ((1.0, 1.0), (0.5, 0.5), (0.5, 0.5)), Bubble.PB3),
        ((500, 500, 500), ((0.5, 1.0), (0.5, 1.0), (0.5, 1.0)), Bubble.UNEVEN),
    ],
)
def test_the_first_stage_idles_for_the_oldest_batch_in_flight(
    prefills: Sequence[int], times: Sequence[tuple[float, float]], reason: Bubble
) -> None:
    """The third batch waits until the first has left the last stage."""
    clock = SimulatedClock()
    pipeline = SimulatedPipeline(Told(times), clock)
    request = Request("any", (0,) * 2000, SamplingParams(), max_tokens=1)
    for place, prefill in enumerate(prefills):
        if place == 2:
            pipeline.collect()
        size = prefill or 1
        chunk = Chunk(request, 0, size, samples=False, is_decode=not prefill)
        pipeline.submit(Batch([chunk]))
    first = pipeline.stages[0]
    expected_s = sum(times[0]) - times[0][0] - times[1][0]
    assert first.idle_s[reason] == pytest.approx(expected_s)
    assert sum(first.idle_s.values()) == pytest.approx(expected_s)


def test_a_later_stage_idles_for_the_batch_that_comes() -> None:
    pipeline = SimulatedPipeline(Told([(0.1, 0.1), (1.0, 1.0)]), SimulatedClock())
    request = Request("any", (0,) * 2000, SamplingParams(), max_tokens=1)
    pipeline.submit(Batch([Chunk(request, 0, 1, samples=False, is_decode=True)]))
    pipeline.submit(Batch([Chunk(request, 0, 900, samples=False, is_decode=False)]))
    assert pipeline.stages[1].idle_s[Bubble.PB2] == pytest.approx(1.1 - 0.2)


def test_even_batches_leave_no_bubbles_and_uneven_ones_do() -> None:
    """Two stages; a batch is on the first while the other is on the second."""
    even = run(system(2), [Arrival(0.0, 10, 50), Arrival(0.001, 10, 50)])
    for stage in even.replicas[0].pipeline.stages:
        idle_s = sum(stage.idle_s.values()) - stage.idle_s[Bubble.NO_WORK]
        assert idle_s < 0.03
    arrivals = [Arrival(0.0, 10, 50), Arrival(0.001, 10, 50)]
    arrivals += [Arrival(0.2 + 0.1 * n, 300 + 200 * n, 20) for n in range(6)]
    uneven = run(system(2, scheduler="hybrid_only"), arrivals)
    chunked = run(system(2, token_budget=64), arrivals)
    assert bubbles_s(uneven) > 3 * bubbles_s(chunked)


def bubbles_s(done: Simulation) -> float:
    """Seconds that stages idled although there was work."""
    stages = done.replicas[0].pipeline.stages
    return sum(stage.idle_s[kind] for stage in stages for kind in (Bubble.PB1, Bubble.PB2))


def test_decodes_are_shared_among_the_stages() -> None:
    done = run(system(2), [Arrival(0.0, 1, 100)] * 8)
    first = done.replicas[0].pipeline.stages[0]
    busy = first.busy_s / done.results.end_s
    assert busy > 0.9


def test_routers() -> None:
    made = system()
    replicas = [made.replica() for _ in range(3)]
    own = [Arrival(0.0, 100, 10, prefix_id=7), Arrival(0.0, 100, 10)]
    turns = RoundRobin()
    assert [turns.choose(own[0], replicas) for _ in range(4)] == [0, 1, 2, 0]
    assert LeastWork().choose(own[1], replicas) == 0
    replicas[0].add(Record(own[1]), 0.0)
    assert LeastWork().choose(own[1], replicas) == 1
    assert PredictedWait().choose(own[1], replicas) == 1


def test_a_prefix_stays_where_it_is_until_that_replica_is_much_busier() -> None:
    replicas = [system().replica() for _ in range(2)]
    affine, prompt = PrefixAffine(), Arrival(0.0, 100, 10, prefix_id=7)
    places = []
    for _ in range(4):
        place = affine.choose(prompt, replicas)
        replicas[place].add(Record(prompt), 0.0)
        places.append(place)
    assert places == [0, 0, 1, 1]  # 0 tokens, then 110 of work; 220 is over 110 more than nothing


def test_a_target_is_kept_in_simulation_too() -> None:
    done = run(system(tbt_slo_s=0.1), random_arrivals(3, 100, rate=4.0))
    numbers = summarize(done.results).latencies["tbt"]
    assert 0.05 < numbers["p99"] <= 0.1


def test_fitted_times_are_near_what_they_were_fitted_to() -> None:
    from stallfree.core.step_time import BatchShape

    known = fitted(Linear(2), 4096)
    assert known.seconds(BatchShape(256, 10_000, 0, 1)) == pytest.approx(2 * 0.266, rel=0.02)

"""The loop with a pipeline of two stages: what is in flight, in which order it comes, who fails."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest

from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.request import FinishReason, Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.engine.loop import Loop, OneStage
from stallfree.executor.output import ExecutorOutput, Pipeline, Sample
from stallfree.sim.clock import SimulatedClock


def run_batch(batch: Batch) -> ExecutorOutput:
    """Samples of each request the number of its tokens."""
    return ExecutorOutput(tuple(Sample(chunk.stop) for chunk in batch.sampling))


class TwoStages:
    """Keeps two batches; a second passes at each collection. Batches of `broken` requests fail."""

    num_stages = 2

    def __init__(self, clock: SimulatedClock) -> None:
        self.clock = clock
        self.broken: set[str] = set()
        self.unsampled: set[str] = set()
        self.error: BaseException = MemoryError("no memory for this batch")
        self.batches: deque[Batch] = deque()

    def submit(self, batch: Batch) -> None:
        assert len(self.batches) < self.num_stages
        self.batches.append(batch)

    def collect(self) -> ExecutorOutput:
        batch = self.batches.popleft()
        self.clock.advance_to(self.clock.now() + 1.0)
        if self.broken & {chunk.request.request_id for chunk in batch.chunks}:
            raise self.error
        samples = [
            Sample(0, error="no number") if chunk.request.request_id in self.unsampled else sample
            for chunk, sample in zip(batch.sampling, run_batch(batch).samples, strict=True)
        ]
        return ExecutorOutput(tuple(samples))


@dataclass(frozen=True, slots=True)
class Timed(StaticBudget):
    """A budget that notes what it is told."""

    seconds: list[float] = field(default_factory=list)

    def observe(self, batch: Batch, seconds: float) -> None:
        self.seconds.append(seconds)


def request(name: str, max_tokens: int = 4) -> Request:
    return Request(
        name, range(10), SamplingParams(ignore_eos=True), max_tokens=max_tokens, arrived_at=0.0
    )


class Setup:
    """Two requests of a pipeline of two stages: after their prompts, a decode in each batch."""

    def __init__(self) -> None:
        self.clock, self.budget = SimulatedClock(), Timed(64)
        self.pipeline = TwoStages(self.clock)
        config = SchedulerConfig(num_stages=2)
        self.scheduler = Scheduler(config, BlockPool(20, 4), self.budget)
        self.loop = Loop(self.scheduler, self.pipeline, self.clock)
        self.first, self.second = request("first"), request("second")
        for each in (self.first, self.second):
            self.scheduler.add(each)
            assert self.loop.dispatch()

    def end(self) -> None:
        """Run what is left, and check that nothing is."""
        while self.loop.num_in_flight or self.loop.dispatch():
            self.loop.collect()
        self.scheduler.check_integrity()
        assert not self.scheduler.has_requests
        assert self.scheduler.pool.num_free == 20
        assert not self.pipeline.batches


@pytest.fixture
def setup() -> Setup:
    return Setup()


def names(batch: Batch) -> list[str]:
    return [chunk.request.request_id for chunk in batch.chunks]


def test_as_many_batches_are_in_flight_as_there_are_stages(setup: Setup) -> None:
    assert [names(batch) for batch in setup.pipeline.batches] == [["first"], ["second"]]
    assert setup.loop.num_in_flight == 2
    setup.scheduler.add(request("third"))
    assert not setup.loop.dispatch()  # there is work, but no room
    assert setup.loop.num_in_flight == 2
    setup.end()


def test_nothing_to_run_is_no_batch(setup: Setup) -> None:
    setup.loop.collect()
    setup.scheduler.finish(setup.first, FinishReason.ABORT)
    assert not setup.loop.dispatch()  # there is room, but the second is in flight
    assert setup.loop.num_in_flight == 1
    setup.end()


def test_batches_come_back_in_the_order_in_which_they_were_sent(setup: Setup) -> None:
    order, started = [], []
    for _ in range(8):
        iteration = setup.loop.collect()
        order += names(iteration.batch)
        started.append(iteration.started_s)
        setup.loop.observe(iteration)
        setup.loop.dispatch()
    assert order == ["first", "second"] * 4
    assert started == [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert setup.budget.seconds == [1.0] + [2.0] * 7  # what was before it in the pipeline included
    assert setup.first.output_token_ids == setup.second.output_token_ids == [10, 11, 12, 13]
    setup.end()


@pytest.mark.parametrize("error", [MemoryError("no memory"), KeyboardInterrupt()])
def test_a_batch_that_fails_ends_its_own_requests_only(setup: Setup, error: BaseException) -> None:
    setup.pipeline.broken, setup.pipeline.error = {"first"}, error
    iteration = setup.loop.collect()
    assert iteration.error is error
    assert iteration.output is None
    assert names(iteration.batch) == ["first"]
    assert setup.first.finish_reason is FinishReason.ERROR
    assert setup.second.finish_reason is None
    assert setup.loop.num_in_flight == 1
    setup.end()
    assert setup.second.finish_reason is FinishReason.LENGTH
    assert setup.second.output_token_ids == [10, 11, 12, 13]


def test_a_sample_that_fails_ends_its_request_only(setup: Setup) -> None:
    setup.pipeline.unsampled = {"second"}
    setup.end()
    assert setup.second.finish_reason is FinishReason.ERROR
    assert setup.second.output_token_ids == []
    assert setup.first.output_token_ids == [10, 11, 12, 13]


def test_a_request_that_leaves_in_flight_is_gone_with_its_batch(setup: Setup) -> None:
    setup.scheduler.finish(setup.second, FinishReason.ABORT)
    assert setup.loop.collect().batch.chunks[0].request is setup.first
    assert setup.scheduler.pool.num_free == 20 - 2 * 3  # its batch still writes there
    setup.loop.collect()
    assert setup.second.finish_reason is FinishReason.ABORT
    setup.end()


def test_one_stage_runs_a_batch_when_it_is_collected() -> None:
    ran: list[list[str]] = []

    class Executor:
        def execute(self, batch: Batch) -> ExecutorOutput:
            ran.append(names(batch))
            return run_batch(batch)

    scheduler = Scheduler(SchedulerConfig(), BlockPool(20, 4), StaticBudget(64))
    pipeline: Pipeline = OneStage(Executor)
    loop = Loop(scheduler, pipeline, SimulatedClock())
    scheduler.add(own := request("own"))
    assert loop.dispatch()
    assert not loop.dispatch()
    assert ran == []
    assert loop.collect().output == ExecutorOutput((Sample(10),))
    while loop.dispatch():
        loop.collect()
    assert ran == [["own"]] * 4
    assert own.output_token_ids == [10, 11, 12, 13]

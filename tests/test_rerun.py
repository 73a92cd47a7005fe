"""Batches that fail in a pipeline are run again, without what is in flight being wrong for it."""

from __future__ import annotations

import random
from collections import deque

import pytest

from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.request import FinishReason, Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.engine.clock import WallClock
from stallfree.engine.loop import Loop
from stallfree.errors import ExecutorError, OutOfMemoryError, WorkersLostError
from stallfree.executor.output import ExecutorOutput, Sample
from stallfree.executor.rerun import RerunningPipeline

GARBAGE = -7


class Stages:
    """A pipeline that knows which tokens have been written, and samples garbage without them.

    Batches of more than `most_tokens` fail, and those of `poisoned` requests.
    """

    can_swap = False

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.most_tokens = 1 << 30
        self.poisoned: set[str] = set()
        self.is_lost = False
        self.ran: list[list[tuple[str, int, int]]] = []
        self._written: dict[str, set[int]] = {}
        self._results: deque[ExecutorOutput | ExecutorError] = deque()

    def submit(self, batch: Batch) -> None:
        assert len(self._results) < self.num_stages
        self._results.append(self._run(batch))

    def collect(self) -> ExecutorOutput:
        if self.is_lost:
            self._results.clear()
            raise WorkersLostError("they are gone")
        result = self._results.popleft()
        if isinstance(result, ExecutorError):
            raise result
        return result

    def execute(self, batch: Batch) -> ExecutorOutput:
        assert not self._results
        self.submit(batch)
        return self.collect()

    def starve(self) -> None: ...

    def tend(self) -> None: ...

    def restart(self) -> None:
        self.is_lost = False
        self._written.clear()

    def close(self) -> None: ...

    def _run(self, batch: Batch) -> ExecutorOutput | ExecutorError:
        own = [(chunk.request.request_id, chunk.start, chunk.stop) for chunk in batch.chunks]
        if batch.num_tokens > self.most_tokens or self.poisoned & {name for name, *_ in own}:
            for name, start, stop in own:  # what was there is overwritten with garbage
                self._written.setdefault(name, set()).difference_update(range(start, stop))
            return OutOfMemoryError(f"no memory for {batch.num_tokens} tokens")
        self.ran.append(own)
        tokens = []
        for chunk, (name, start, stop) in zip(batch.chunks, own, strict=True):
            written = self._written.setdefault(name, set())
            is_right = written.issuperset(range(start))
            if is_right:
                written.update(range(start, stop))
            else:
                written.difference_update(range(start, stop))
            if chunk.samples:
                tokens.append(stop if is_right else GARBAGE)
        return ExecutorOutput(tuple(map(Sample, tokens)))


def request(name: str, num_prompt: int, max_tokens: int = 5) -> Request:
    params = SamplingParams(ignore_eos=True)
    prompt = range(num_prompt)
    return Request(name, prompt, params, max_tokens=max_tokens, cache_salt=name)


class Setup:
    """A loop over such stages."""

    def __init__(self, num_stages: int, budget: int = 16) -> None:
        self.stages = Stages(num_stages)
        config = SchedulerConfig(num_stages=num_stages, sequence_pipelining=True, max_model_len=256)
        self.scheduler = Scheduler(config, BlockPool(200, 4), StaticBudget(budget))
        self.loop = Loop(self.scheduler, RerunningPipeline(self.stages), WallClock())

    def fill(self) -> None:
        while self.loop.dispatch():
            pass

    def end(self) -> None:
        """Run what is left to its end."""
        self.fill()
        while self.loop.num_in_flight:
            self.loop.collect()
            self.scheduler.check_integrity()
            self.fill()
        assert not self.scheduler.has_requests


def right(own: Request) -> list[int]:
    """What comes of a request whose tokens were all there."""
    return [own.num_prompt_tokens + i for i in range(own.max_tokens)]


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("seed", range(8))
def test_answers_are_right_with_failures_at_any_moment(num_stages: int, seed: int) -> None:
    rng = random.Random(seed)
    own = Setup(num_stages)
    requests = [request(str(i), rng.randint(1, 90)) for i in range(12)]
    waiting = deque(requests)
    num_failures = 0
    while waiting or own.scheduler.has_requests:
        if waiting and rng.random() < 0.5:
            own.scheduler.add(waiting.popleft())
        own.stages.most_tokens = rng.choice([1 << 30, 11, 3])
        own.fill()
        own.stages.most_tokens = rng.choice([1 << 30, 7, 1])
        num_failures += sum(isinstance(each, Exception) for each in own.stages._results)
        if own.loop.num_in_flight:
            assert own.loop.collect().error is None
            own.scheduler.check_integrity()
    assert num_failures > 3
    assert [each.output_token_ids for each in requests] == [right(each) for each in requests]


def test_what_is_poisoned_fails_and_nobody_else() -> None:
    own = Setup(num_stages=2)
    requests = [request("poisoned", 60), *(request(str(i), 20 + i) for i in range(4))]
    own.stages.poisoned = {"poisoned"}
    for each in requests:
        own.scheduler.add(each)
    own.end()
    assert requests[0].finish_reason is FinishReason.ERROR
    assert requests[0].output_token_ids == []
    for each in requests[1:]:
        assert each.finish_reason is FinishReason.LENGTH
        assert each.output_token_ids == right(each)


def test_what_is_in_flight_and_has_to_do_with_nothing_that_failed_is_not_run_again() -> None:
    own = Setup(num_stages=2)
    first, second = request("first", 16), request("second", 16)
    for each in (first, second):
        own.scheduler.add(each)
    own.stages.most_tokens = 10
    assert own.loop.dispatch()
    own.stages.most_tokens = 16
    assert own.loop.dispatch()
    assert own.loop.collect().error is None
    assert own.stages.ran == [[("second", 0, 16)], [("first", 0, 16)]]
    assert own.loop.collect().error is None
    assert own.stages.ran[2:] == []
    own.end()
    assert (first.output_token_ids, second.output_token_ids) == (right(first), right(second))


def test_later_chunks_of_a_prompt_that_failed_are_run_again_after_it() -> None:
    own = Setup(num_stages=2)
    own.scheduler.add(long := request("long", 40))
    own.stages.most_tokens = 10
    assert own.loop.dispatch()
    own.stages.most_tokens = 16
    assert own.loop.dispatch()
    assert own.loop.collect().error is None
    chunks = [("long", 0, 16), ("long", 16, 32)]
    assert own.stages.ran == [[chunks[1]], [chunks[0]], [chunks[1]]]
    own.end()
    assert long.output_token_ids == right(long)


def test_a_loss_while_something_is_run_again_is_a_loss_of_all() -> None:
    own = Setup(num_stages=2)
    requests = [request("long", 40), request("short", 4)]
    for each in requests:
        own.scheduler.add(each)
    own.fill()
    own.stages.most_tokens = 10
    own.loop.collect()
    own.fill()
    own.stages.is_lost = True
    iteration = own.loop.collect()
    assert isinstance(iteration.error, WorkersLostError)
    assert len(iteration.lost) == 2
    assert own.loop.num_in_flight == 0
    own.stages.restart()
    own.stages.most_tokens = 1 << 30
    own.end()
    assert [each.output_token_ids for each in requests] == [right(each) for each in requests]

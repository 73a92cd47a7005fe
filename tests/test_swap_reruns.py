"""Copies and batches that fail: copies are done once, and nothing runs after those that failed."""

from __future__ import annotations

import pytest

from stallfree.core.batch import NO_COPIES, Batch, Copies, CopyIn
from stallfree.core.blocks import BlockPool
from stallfree.core.budget import StaticBudget
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.engine.loop import OneStage
from stallfree.errors import CopyError, ExecutorError, OutOfMemoryError
from stallfree.executor.copier import BlockCopies
from stallfree.executor.output import ExecutorOutput, Sample
from stallfree.executor.rerun import RerunningPipeline


class _Fails:
    """An executor that cannot run more than a token at once."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def execute(self, batch: Batch) -> ExecutorOutput:
        self.events.append(f"run {batch.num_tokens}")
        if batch.num_tokens > 1:
            raise MemoryError("no memory for this batch")
        return ExecutorOutput((Sample(1),) * len(batch.sampling))


def copying_batch() -> Batch:
    scheduler = Scheduler(SchedulerConfig(max_model_len=64), BlockPool(20, 4), StaticBudget(64))
    params = SamplingParams(max_tokens=2)
    scheduler.add(Request("own", (1, 2), params, max_tokens=2))
    batch = scheduler.schedule()
    assert batch is not None
    batch.copies = Copies(ins=(CopyIn(0, 0),))
    return batch


def test_copies_are_done_once_although_a_batch_is_run_in_parts() -> None:
    events: list[str] = []
    stage = OneStage(lambda: _Fails(events), lambda copies: events.append(f"copy {copies.ins}"))
    stage.submit(copying_batch())
    stage.collect()
    assert events == ["copy ((0, 0),)", "run 2", "run 2", "run 1", "run 1"]


def test_nothing_runs_after_copies_that_failed() -> None:
    events: list[str] = []

    def copy(copies: BlockCopies) -> None:
        raise CopyError("the disk is gone")

    stage = OneStage(lambda: _Fails(events), copy)
    stage.submit(copying_batch())
    with pytest.raises(CopyError, match="the disk is gone"):
        stage.collect()
    assert events == []


class _Pipeline:
    """One of two stages, whose first batch fails."""

    num_stages = 2
    can_swap = True

    def __init__(self, error: ExecutorError) -> None:
        self.error = error
        self.copied: list[Copies] = []
        self.results: list[ExecutorOutput | ExecutorError] = []

    def submit(self, batch: Batch) -> None:
        fails = not self.copied
        self.copied.append(batch.copies)
        output = ExecutorOutput((Sample(1),) * len(batch.sampling))
        self.results.append(self.error if fails else output)

    def collect(self) -> ExecutorOutput:
        result = self.results.pop(0)
        if isinstance(result, ExecutorError):
            raise result
        return result

    def execute(self, batch: Batch) -> ExecutorOutput:
        self.submit(batch)
        return self.collect()

    def starve(self) -> None: ...

    def tend(self) -> None: ...

    def restart(self) -> None: ...

    def close(self) -> None: ...


def test_a_batch_that_a_pipeline_runs_again_is_not_copied_again() -> None:
    inner = _Pipeline(OutOfMemoryError("no memory for this batch"))
    pipeline = RerunningPipeline(inner)
    first, second = copying_batch(), copying_batch()
    pipeline.submit(first)
    pipeline.submit(second)
    assert pipeline.collect().samples == (Sample(1),)
    assert pipeline.collect().samples == (Sample(1),)
    # as the second one has a request of the same name, it is run again too
    assert inner.copied == [first.copies, second.copies, NO_COPIES, NO_COPIES]


def test_a_batch_that_a_pipeline_could_not_copy_for_is_not_run_again() -> None:
    inner = _Pipeline(CopyError("the disk is gone"))
    pipeline = RerunningPipeline(inner)
    first, second = copying_batch(), copying_batch()
    pipeline.submit(first)
    pipeline.submit(second)
    with pytest.raises(CopyError, match="the disk is gone"):
        pipeline.collect()
    assert pipeline.collect().samples == (Sample(1),)
    assert inner.copied == [first.copies, second.copies]

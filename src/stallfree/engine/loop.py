"""The loop: schedule, submit, collect, complete. The server and the simulator run this one.

It owns the order of these calls and the batches in flight. It knows nothing of text, clients, or
whether time passes by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from stallfree.core.batch import Batch
from stallfree.core.request import FinishReason
from stallfree.core.scheduler import Scheduler
from stallfree.engine.clock import Clock
from stallfree.errors import CopyError, ExecutorError, WorkersLostError
from stallfree.executor.copier import BlockCopies
from stallfree.executor.output import Executor, ExecutorOutput, Pipeline
from stallfree.executor.parts import run_in_parts


@dataclass(frozen=True, slots=True)
class Iteration:
    """A batch that came back.

    Attributes:
        batch: what ran.
        lost: all batches that were in flight, if what runs them was lost, or KV could not be copied
            for the first of them: none of them has ended.
        started_s: when it was scheduled, by the clock.
        output: what came of it; None if it failed.
        error: why it failed.
    """

    batch: Batch
    started_s: float
    output: ExecutorOutput | None = None
    error: BaseException | None = None
    lost: tuple[Batch, ...] = ()


class Loop:
    """Runs a scheduler's batches, as many at once as the pipeline has stages.

    Args:
        scheduler: decides each iteration.
        pipeline: runs them.
        clock: says when.
    """

    def __init__(self, scheduler: Scheduler, pipeline: Pipeline, clock: Clock) -> None:
        self.scheduler = scheduler
        self.pipeline = pipeline
        self.clock = clock
        self._in_flight: deque[tuple[Batch, float]] = deque()

    @property
    def num_in_flight(self) -> int:
        """Batches that were submitted and have not been collected."""
        return len(self._in_flight)

    def dispatch(self) -> bool:
        """Schedule and submit a batch; False if there is no room for one, or nothing to run."""
        if len(self._in_flight) >= self.pipeline.num_stages:
            return False
        now = self.clock.now()
        batch = self.scheduler.schedule(now)
        if batch is None:
            return False
        try:
            self.pipeline.submit(batch)
        except BaseException:
            self.scheduler.fail(batch)
            raise
        self._in_flight.append((batch, now))
        return True

    def collect(self) -> Iteration:
        """Wait for the oldest batch in flight and complete it.

        If it failed, its requests have ended, and no others. If the pipeline was lost, so were all
        batches in flight, and all requests wait to be computed again. If KV could not be copied for
        it, they wait as well, and none is copied any more.
        """
        batch, started_s = self._in_flight.popleft()
        try:
            output = self._collect_or_let_through()
        except (CopyError, WorkersLostError) as error:
            lost = (batch, *(each for each, _ in self._in_flight))
            self._in_flight.clear()
            if isinstance(error, CopyError):
                self.scheduler.stop_copying(lost)
            else:
                self.scheduler.recompute(lost)
            return Iteration(batch, started_s, error=error, lost=lost)
        except BaseException as error:  # an interrupt too: leave nothing in flight behind
            self.scheduler.fail(batch)
            return Iteration(batch, started_s, error=error)
        for chunk, sample in zip(batch.sampling, output.samples, strict=True):
            if sample.error is not None:
                self.scheduler.finish(chunk.request, FinishReason.ERROR)
        for chunk in batch.chunks if output.failed else ():
            if chunk.request.request_id in output.failed:
                self.scheduler.finish(chunk.request, FinishReason.ERROR)
        self.scheduler.complete(batch, [sample.token_id for sample in output.samples])
        return Iteration(batch, started_s, output)

    def _collect_or_let_through(self) -> ExecutorOutput:
        """What the pipeline gives next; if it could not copy KV, what is behind goes through it."""
        try:
            return self.pipeline.collect()
        except CopyError:
            for _ in self._in_flight:
                with suppress(ExecutorError):
                    self.pipeline.collect()
            raise

    def observe(self, iteration: Iteration) -> float:
        """Tell the budget how long an iteration took, all that was done for it included."""
        seconds = self.clock.now() - iteration.started_s
        self.scheduler.budget.observe(iteration.batch, seconds)
        return seconds


class OneStage:
    """A `Pipeline` of one stage: an executor that runs a batch when it is collected.

    A batch that fails is run in parts, as nothing else is in flight. Its copies are done once,
    before: what they copied out may be overwritten then. If they fail, nothing of it runs.

    Args:
        executor: gives the executor, asked each time.
        copy: copies KV; None where the scheduler has none copied.
    """

    num_stages = 1

    def __init__(
        self, executor: Callable[[], Executor], copy: Callable[[BlockCopies], None] | None = None
    ) -> None:
        self._executor = executor
        self._copy = copy
        self._batch: Batch | None = None

    def submit(self, batch: Batch) -> None:
        """Keep the batch."""
        self._batch = batch

    def collect(self) -> ExecutorOutput:
        """Run it."""
        batch, self._batch = self._batch, None
        assert batch is not None, "nothing was submitted"
        if batch.copies:
            assert self._copy is not None, "nothing copies KV"
            self._copy(BlockCopies.of(batch.copies))
        return run_in_parts(self._executor(), batch)

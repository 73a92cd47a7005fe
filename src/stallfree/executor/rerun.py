"""Running a batch again, in parts, that failed while others were in flight behind it.

Those are let through first. Then the batch runs alone, as `parts.py` has it, and after it those
that failed too, or that hold a later chunk of one of its prompts, in their order: what they wrote
depends on what was not there. Others have their results already. No new batch is sent meanwhile.

Copies to and from the swap space are not done again: what goes out may be overwritten by now. A
batch whose copies failed is not run again either: all that is in flight is then taken back.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

from stallfree.core.batch import Batch
from stallfree.errors import CopyError, ExecutorError, WorkersLostError
from stallfree.executor.output import ExecutorOutput, WorkerPipeline
from stallfree.executor.parts import run_in_parts

_Outcome = ExecutorOutput | ExecutorError

logger = logging.getLogger(__name__)


class RerunningPipeline:
    """A `Pipeline` over one of processes, whose batches fail only for what cannot run alone.

    Args:
        pipeline: runs the batches; after a failure of one it goes on.
    """

    def __init__(self, pipeline: WorkerPipeline) -> None:
        self._pipeline = pipeline
        self._in_flight: deque[Batch] = deque()
        self._ended: deque[_Outcome] = deque()  # of the oldest in flight, as far as known already

    @property
    def num_stages(self) -> int:
        """See `Pipeline`."""
        return self._pipeline.num_stages

    def submit(self, batch: Batch) -> None:
        """See `Pipeline`."""
        self._pipeline.submit(batch)
        self._in_flight.append(batch)

    def collect(self) -> ExecutorOutput:
        """See `Pipeline`."""
        batch = self._in_flight.popleft()
        try:
            outcome = self._ended.popleft() if self._ended else self._first(batch)
        except WorkersLostError:
            self._in_flight.clear()
            self._ended.clear()
            raise
        if isinstance(outcome, ExecutorError):
            raise outcome
        return outcome

    def _first(self, batch: Batch) -> _Outcome:
        """What comes of the oldest batch in flight."""
        try:
            return self._pipeline.collect()
        except CopyError as error:
            return error
        except ExecutorError as error:
            logger.warning("an iteration of %d tokens failed: %s", batch.num_tokens, error)
        for _ in self._in_flight:
            self._ended.append(ExecutorError("it was broken off"))  # should this be interrupted
            self._ended[-1] = _outcome(self._pipeline.collect)
        outcome = self._run_again(batch)
        stale = _requests_of(batch)
        for place, later in enumerate(self._in_flight):
            if isinstance(self._ended[place], CopyError):
                continue
            is_stale = not stale.isdisjoint(_requests_of(later))
            if is_stale or isinstance(self._ended[place], ExecutorError):
                self._ended[place] = self._run_again(later)
                stale |= _requests_of(later)
        return outcome

    def _run_again(self, batch: Batch) -> _Outcome:
        return _outcome(lambda: run_in_parts(self._pipeline, batch.without_copies()))


def _outcome(run: Callable[[], ExecutorOutput]) -> _Outcome:
    try:
        return run()
    except ExecutorError as error:
        return error


def _requests_of(batch: Batch) -> set[str]:
    return {chunk.request.request_id for chunk in batch.chunks}

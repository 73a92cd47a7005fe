"""A model in several processes, as one `Pipeline`: sends every batch to all, and collects it.

Nothing about a request is kept anywhere but here and in its KV blocks: block tables travel with
each batch.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from stallfree.core.batch import Batch
from stallfree.errors import CopyError, ExecutorError, OutOfMemoryError, WorkersLostError
from stallfree.executor.launch import Launcher, WorkerProcess
from stallfree.executor.messages import Done, MakeCache, MakeSwap, Ready, Run, WorkerSpec
from stallfree.executor.output import ExecutorOutput
from stallfree.executor.stage_log import StageLog
from stallfree.executor.step import step_of
from stallfree.executor.swap_store import CopyTimes
from stallfree.executor.worker_group import WorkerGroup
from stallfree.model.loading import Footprint

START_TIMEOUT_S = 900.0  # loading a large model from a slow disk, or compiling kernels

logger = logging.getLogger(__name__)


class DistributedPipeline:
    """Processes that run a model together. Also an `Executor`, for one batch at a time.

    Args:
        specs: of all workers, by rank.
        launcher: starts them.
        timeout_s: how long a batch may take before its workers count as lost.
        log: told of each batch that went through a stage.

    Attributes:
        num_stages: most batches in flight.
        footprint: of all workers together.

    Raises:
        WorkersLostError: some did not start; says which, and why.
    """

    def __init__(
        self, specs: Sequence[WorkerSpec], launcher: Launcher, *, timeout_s: float, log: StageLog
    ) -> None:
        self._specs = list(specs)
        self.num_stages = len({spec.part.first_layer for spec in specs})
        self._launcher = launcher
        self._timeout_s = timeout_s
        self._start_timeout_s = START_TIMEOUT_S
        self.log = log
        self._last = next(spec.rank for spec in specs if spec.following is None)
        self._make_cache: MakeCache | None = None
        self._make_swap: MakeSwap | None = None
        self._group = WorkerGroup(specs, launcher)
        started = time.monotonic()
        try:
            self.footprint = self._start()
        except BaseException:
            self.close()
            raise
        # nothing is compiled or fetched when they start again
        self._start_timeout_s = timeout_s + 3 * (time.monotonic() - started)

    @property
    def workers(self) -> Sequence[WorkerProcess]:
        """The processes, by rank."""
        return self._group.processes

    def make_cache(self, num_blocks: int, block_size: int) -> None:
        """Have every worker allocate the KV cache of its layers.

        Raises:
            MemoryError: one could not.
            WorkersLostError: one ended.
        """
        self._make_cache = MakeCache(num_blocks, block_size)
        self._make(self._make_cache)

    @property
    def can_swap(self) -> bool:
        """Whether the workers have a swap space."""
        return self._make_swap is not None

    def make_swap(self, num_slots: int, folder: Path | None) -> CopyTimes:
        """Have every worker make a swap space for its layers, and measure it.

        Returns:
            What a batch waits for all stages: those of the slowest share of each.

        Raises:
            MemoryError: one has no room for it.
            WorkersLostError: one ended.
        """
        self._make_swap = MakeSwap(num_slots, folder)
        slowest: dict[int, CopyTimes] = {}  # by the first layer of a stage
        for rank, ready in self._make(self._make_swap).items():
            assert ready.times is not None, "a swap space is measured"
            stage = self._specs[rank].part.first_layer
            slowest[stage] = ready.times.slower_of(slowest.get(stage, ready.times))
        return CopyTimes(
            sum(times.out_s for times in slowest.values()),
            sum(times.in_s for times in slowest.values()),
        )

    def submit(self, batch: Batch) -> None:
        """Send a batch through the stages."""
        run = Run(self._num_submitted, step_of(batch))
        self.log.submitted(run.step_id, batch, time.monotonic())
        self._group.tell_all(run)
        self._in_flight.append(run.step_id)
        self._num_submitted += 1

    def collect(self) -> ExecutorOutput:
        """Wait for the oldest batch in flight.

        Raises:
            ExecutorError: it failed on a worker, which goes on; OutOfMemoryError if that had no
                memory for it, CopyError if one of them could not copy KV.
            WorkersLostError: a worker has ended or does not answer; nothing runs until `restart`.
        """
        step_id = self._in_flight.popleft()
        deadline = time.monotonic() + self._timeout_s
        while min(self._num_done.values()) <= step_id:  # whichever failed says so itself
            self._hear(deadline, partial(self._silent, step_id))
        output, failures = self._outputs.pop(step_id), self._failures.pop(step_id, {})
        if failures:
            rank = min(failures)
            kind = OutOfMemoryError if failures[rank].no_memory else ExecutorError
            kind = CopyError if any(done.no_copy for done in failures.values()) else kind
            raise kind(f"{self._specs[rank].name} failed:\n{failures[rank].error}")
        assert output is not None, "the last stage gives an output or an error"
        return output

    def execute(self, batch: Batch) -> ExecutorOutput:
        """Run a batch while no other is in flight."""
        self.submit(batch)
        return self.collect()

    def starve(self) -> None:
        """Note that there is room for a batch, but nothing to run."""
        self.log.starved(time.monotonic())

    def tend(self) -> None:
        """Notice, while no batch is in flight, that a worker has ended.

        Raises:
            WorkersLostError: one has.
        """
        while self._group.has_news:
            self._hear(time.monotonic() + 1, str)

    def restart(self) -> None:
        """Start all workers anew; their KV is lost.

        Raises:
            WorkersLostError: some did not start.
        """
        try:
            self._begin_anew()
        except MemoryError as error:
            if self._make_swap is None:
                raise WorkersLostError(str(error), no_memory=True) from error
            logger.error("the workers are started without a swap space: %s", error)
            self._make_swap = None
            self.restart()

    def _begin_anew(self) -> None:
        self._group.end()
        self._start()
        if self._make_cache is not None:
            self.make_cache(self._make_cache.num_blocks, self._make_cache.block_size)
        if self._make_swap is not None:
            self.make_swap(self._make_swap.num_slots, self._make_swap.folder)

    def close(self) -> None:
        """End all workers, and what is written of them."""
        self._group.end()
        self._launcher.close()
        self.log.close()

    def _start(self) -> Footprint:
        self._num_submitted = 0
        self.log.restarted()
        self._in_flight: deque[int] = deque()
        self._num_done = dict.fromkeys((spec.rank for spec in self._specs), 0)
        self._outputs: dict[int, ExecutorOutput | None] = {}
        self._failures: dict[int, dict[int, Done]] = {}  # by batch and rank
        loaded = self._group.start(self._start_timeout_s)
        footprints = [each.footprint for each in loaded.values()]
        return Footprint(
            sum(each.num_parameters for each in footprints),
            sum(each.weight_bytes for each in footprints),
            sum(each.kv_bytes_per_token for each in footprints),
        )

    def _make(self, message: MakeCache | MakeSwap) -> dict[int, Ready]:
        """Have every worker make something; what each said when it was there."""
        self._group.tell_all(message)
        return self._group.hear_all(Ready, self._start_timeout_s)

    def _hear(self, deadline: float, silent: Callable[[], str]) -> None:
        """Take note of what a worker says next, which is of a batch.

        Raises:
            WorkersLostError: see `WorkerGroup.hear`.
        """
        answer = self._group.hear(deadline, silent)
        if answer is not None:
            rank, message = answer
            assert isinstance(message, Done), f"{message} came while batches run"
            self._note(rank, message)

    def _note(self, rank: int, done: Done) -> None:
        """A batch went through a worker."""
        self._num_done[rank] = done.step_id + 1
        if done.error is not None:
            self._failures.setdefault(done.step_id, {})[rank] = done
        if rank == self._last:
            self._outputs[done.step_id] = done.output
        part = self._specs[rank].part
        if part.tp_rank == 0:
            self.log.ran(rank // part.tp_size, done.step_id, done.started_s, done.ended_s)

    def _silent(self, step_id: int) -> str:
        """Who holds up a batch: the first stage that it has not gone through."""
        waiting = [spec for spec in self._specs if self._num_done[spec.rank] <= step_id]
        stage = [each for each in waiting if each.part.layers == waiting[0].part.layers]
        names = " or ".join(each.name for each in stage)
        return f"{names} has not answered for {self._timeout_s:g} s"

"""A model in several processes, as one `Pipeline`: sends every batch to all, and watches them.

Nothing about a request is kept anywhere but here and in its KV blocks: block tables travel with
each batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import TypeVar

import torch.distributed as dist

from stallfree.core.batch import Batch
from stallfree.errors import ExecutorError, WorkersLostError
from stallfree.executor.launch import Launcher, WorkerProcess
from stallfree.executor.messages import Crashed, Done, Loaded, MakeCache, Ready, Run, WorkerSpec
from stallfree.executor.output import ExecutorOutput
from stallfree.executor.stage_log import StageLog
from stallfree.executor.step import step_of
from stallfree.model.loading import Footprint

START_TIMEOUT_S = 900.0  # loading a large model from a slow disk, or compiling kernels
_CULPRIT_S = 2.0  # how long the end of a process may take to be noticed

Message = Loaded | Ready
_Answer = TypeVar("_Answer", Loaded, Ready)


class _Outbox:
    """Sends to one worker from a thread of its own, as a stopped worker reads nothing."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._payloads: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="stallfree-outbox", daemon=True).start()

    def put(self, payload: bytes | None) -> None:
        """Send pickled bytes; None ends the thread."""
        self._payloads.put(payload)

    def _run(self) -> None:
        with suppress(OSError):  # it has ended, which whoever reads from it notices
            while (payload := self._payloads.get()) is not None:
                self._connection.send_bytes(payload)


class DistributedPipeline:
    """Processes that run a model together. Also an `Executor`, for one batch at a time.

    Args:
        specs: of all workers, by rank; their `store` is filled in.
        launcher: starts them.
        timeout_s: how long a batch may take before its workers count as lost.
        log: told of each batch that went through a stage.

    Raises:
        WorkersLostError: some did not start; says which, and why.
    """

    def __init__(
        self,
        specs: Sequence[WorkerSpec],
        launcher: Launcher,
        *,
        timeout_s: float,
        log: StageLog,
    ) -> None:
        self._specs = list(specs)
        self._launcher = launcher
        self._timeout_s = timeout_s
        self.log = log
        self._last = next(spec.rank for spec in specs if spec.following is None)
        self._make_cache: MakeCache | None = None
        self._workers: list[WorkerProcess] = []
        self._outboxes: list[_Outbox] = []
        try:
            self.footprint = self._start()
        except BaseException:
            self.close()
            raise

    @property
    def num_stages(self) -> int:
        """Most batches in flight."""
        return len({spec.part.first_layer for spec in self._specs})

    @property
    def workers(self) -> Sequence[WorkerProcess]:
        """The processes, by rank."""
        return self._workers

    def make_cache(self, num_blocks: int, block_size: int) -> None:
        """Have every worker allocate the KV cache of its layers.

        Raises:
            MemoryError: one could not.
            WorkersLostError: one ended.
        """
        self._make_cache = MakeCache(num_blocks, block_size)
        self._tell_all(self._make_cache)
        for rank, ready in self._hear_all(Ready).items():
            if ready.error is not None:
                raise MemoryError(f"{self._specs[rank].name}: {ready.error}")

    def submit(self, batch: Batch) -> None:
        """Send a batch through the stages."""
        self.log.submitted(self._num_submitted, batch, time.monotonic())
        self._in_flight.append(self._num_submitted)
        self._tell_all(Run(self._num_submitted, step_of(batch)))
        self._num_submitted += 1

    def collect(self) -> ExecutorOutput:
        """Wait for the oldest batch in flight.

        Raises:
            ExecutorError: it failed on a worker, which goes on.
            WorkersLostError: a worker has ended or does not answer; nothing runs until `restart`.
        """
        step_id = self._in_flight.popleft()
        deadline = time.monotonic() + self._timeout_s
        while step_id not in self._outputs:
            self._hear(deadline, partial(self._silent, step_id))
        self._hear(0, str)  # what failed in another stage was said before the last one was done
        output, errors = self._outputs.pop(step_id), self._errors.pop(step_id, {})
        if errors:
            rank, text = min(errors.items())
            raise ExecutorError(f"{self._specs[rank].name} failed:\n{text}")
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
        self._hear(0, str)

    def restart(self) -> None:
        """Start all workers anew; their KV is lost.

        Raises:
            WorkersLostError: some did not start.
        """
        self._end_workers()
        self._start()
        if self._make_cache is not None:
            self.make_cache(self._make_cache.num_blocks, self._make_cache.block_size)

    def close(self) -> None:
        """End all workers, and what is written of them."""
        self._end_workers()
        self._launcher.close()
        self.log.close()

    def _end_workers(self) -> None:
        for outbox in self._outboxes:
            outbox.put(None)
        for worker in self._workers:
            worker.kill()
        self._workers, self._outboxes = [], []

    def _start(self) -> Footprint:
        self._num_submitted = 0
        self.log.restarted()
        self._in_flight: deque[int] = deque()
        self._num_done = dict.fromkeys((spec.rank for spec in self._specs), 0)
        self._broken: str | None = None  # what one said that could not reach another
        self._outputs: dict[int, ExecutorOutput | None] = {}
        self._errors: dict[int, dict[int, str]] = {}  # tracebacks, by batch and rank
        host = self._launcher.host
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        address = (host, self._store.port)
        self._specs = [replace(spec, store=address) for spec in self._specs]
        try:
            for spec in self._specs:
                worker = self._launcher.start(spec)
                self._workers.append(worker)
                self._outboxes.append(_Outbox(worker.connection))
            footprints = [each.footprint for each in self._hear_all(Loaded).values()]
        except BaseException:
            self._end_workers()
            raise
        return Footprint(
            sum(each.num_parameters for each in footprints),
            sum(each.weight_bytes for each in footprints),
            sum(each.kv_bytes_per_token for each in footprints),
        )

    def _tell_all(self, message: MakeCache | Run) -> None:
        payload = bytes(ForkingPickler.dumps(message))
        for outbox in self._outboxes:
            outbox.put(payload)

    def _hear_all(self, kind: type[_Answer]) -> dict[int, _Answer]:
        """One message of a kind from every worker."""
        heard: dict[int, _Answer] = {}
        deadline = time.monotonic() + START_TIMEOUT_S

        def silent() -> str:
            missing = next(spec for spec in self._specs if spec.rank not in heard)
            return f"{missing.name} has not started within {START_TIMEOUT_S:g} s"

        while len(heard) < len(self._workers):
            for rank, message in self._hear(deadline, silent):
                assert isinstance(message, kind), f"{message} came instead of {kind}"
                heard[rank] = message
        return heard

    def _hear(self, deadline: float, silent: Callable[[], str]) -> list[tuple[int, Message]]:
        """What workers say next, batches that are done aside: those are taken note of.

        With a deadline that has passed it does not wait. If one could not reach another, it waits
        a moment for which of them that was.

        Raises:
            WorkersLostError: one has ended; or all are silent until the deadline, with `silent()`.
        """
        if self._broken is not None:
            deadline = min(deadline, time.monotonic() + _CULPRIT_S)
        ranks = {worker.connection: rank for rank, worker in enumerate(self._workers)}
        left_s = deadline - time.monotonic()
        ready = wait(list(ranks), max(0.0, left_s))
        if not ready and left_s > 0:
            raise self._lost(self._broken or silent())
        others = []
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = ranks[connection]
            try:
                message = connection.recv()
            except (EOFError, OSError):
                how = self._workers[rank].how_it_ended()
                raise self._lost(f"{self._specs[rank].name} was lost: {how}") from None
            if isinstance(message, Crashed) and message.by_others:
                self._broken = f"{self._specs[rank].name} lost contact:\n{message.traceback}"
            elif isinstance(message, Crashed):
                text = f"{self._specs[rank].name} failed:\n{message.traceback}"
                raise self._lost(text)
            elif isinstance(message, Done):
                self._note(rank, message)
            else:
                others.append((rank, message))
        return others

    def _note(self, rank: int, done: Done) -> None:
        """A batch went through a worker."""
        self._num_done[rank] = done.step_id + 1
        if done.error is not None:
            self._errors.setdefault(done.step_id, {})[rank] = done.error
        if rank == self._last:
            self._outputs[done.step_id] = done.output
        part = self._specs[rank].part
        if part.tp_rank == 0:
            self.log.ran(rank // part.tp_size, done.step_id, done.started_s, done.ended_s)

    def _silent(self, step_id: int) -> str:
        """Who holds up a batch: the first of those that it has not gone through."""
        rank = next(spec.rank for spec in self._specs if self._num_done[spec.rank] <= step_id)
        return f"{self._specs[rank].name} has not answered for {self._timeout_s:g} s"

    def _lost(self, message: str) -> WorkersLostError:
        """End what is left of the workers: they cannot run without each other."""
        self._end_workers()
        return WorkersLostError(message)

"""The processes of a model together: started, told and heard as one, and ended as one.

They cannot run without each other: when one is lost, all are ended. Nothing here knows what they
are told, or what a batch is.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist

from stallfree.errors import WorkersLostError
from stallfree.executor.launch import Launcher, WorkerProcess
from stallfree.executor.line import Line, pickled
from stallfree.executor.messages import (
    Crashed,
    Done,
    Loaded,
    MakeCache,
    MakeSwap,
    Ready,
    Run,
    WorkerSpec,
)

_CULPRIT_S = 2.0  # how long the end of a process may take to be noticed

Message = Loaded | Ready | Done
_Answer = TypeVar("_Answer", Loaded, Ready)


class WorkerGroup:
    """Starts workers, and talks to them; none is there before the first `start`.

    Args:
        specs: of all workers, by rank; their `store` is filled in.
        launcher: starts them.

    Attributes:
        processes: the workers, by rank; none once they were ended.
    """

    def __init__(self, specs: Sequence[WorkerSpec], launcher: Launcher) -> None:
        self._specs = list(specs)
        self._launcher = launcher
        self.processes: list[WorkerProcess] = []
        self._lines: list[Line] = []

    @property
    def has_news(self) -> bool:
        """Whether one has said something that was not heard yet."""
        return not self._inbox.empty()

    def start(self, timeout_s: float) -> dict[int, Loaded]:
        """Start all workers, of which none is left, and wait until they have loaded the model.

        Returns:
            What each said then, by rank.

        Raises:
            WorkersLostError: some did not start; says which, and why.
        """
        self._broken: str | None = None  # what one said that could not reach another
        self._inbox: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        host = self._launcher.host
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        address = (host, self._store.port)
        self._specs = [replace(spec, store=address) for spec in self._specs]
        inbox = self._inbox
        try:
            for spec in self._specs:
                worker = self._launcher.start(spec)
                self.processes.append(worker)
                self._lines.append(Line(worker.connection, partial(_post, inbox, spec.rank)))
            return self.hear_all(Loaded, timeout_s)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """End all workers, whatever they are doing."""
        for line in self._lines:
            line.close()
        for worker in self.processes:
            worker.kill()
        self.processes, self._lines = [], []

    def tell_all(self, message: MakeCache | MakeSwap | Run) -> None:
        """Send a message to every worker."""
        payload = pickled(message)
        try:
            for line in self._lines:
                line.put(payload)
        except BaseException:  # some have it, some have not
            self.end()
            raise

    def hear_all(self, kind: type[_Answer], timeout_s: float) -> dict[int, _Answer]:
        """One message of a kind from every worker, by rank; no batch is in flight.

        Raises:
            MemoryError: one had no memory for what it was to make; all are ended.
            WorkersLostError: one has ended, or they are silent for so long.
        """
        heard: dict[int, _Answer] = {}
        deadline = time.monotonic() + timeout_s

        def silent() -> str:
            missing = next(spec for spec in self._specs if spec.rank not in heard)
            return f"{missing.name} has not started within {timeout_s:.0f} s"

        while len(heard) < len(self._specs):
            answer = self.hear(deadline, silent)
            if answer is None:
                continue
            rank, message = answer
            if isinstance(message, Ready) and message.error is not None:
                self.end()
                raise MemoryError(f"{self._specs[rank].name}: {message.error}")
            assert isinstance(message, kind), f"{message} came instead of {kind}"
            heard[rank] = message
        return heard

    def hear(self, deadline: float, silent: Callable[[], str]) -> tuple[int, Message] | None:
        """What a worker says next, with its rank; None if that was that it cannot reach another.

        It waits a moment then for which of them that was.

        Args:
            deadline: by the monotonic clock.
            silent: what to say if nobody says anything until then.

        Raises:
            WorkersLostError: one has ended, or all are silent until the deadline.
        """
        if not self.processes:
            raise WorkersLostError("the processes of the model have ended")
        if self._broken is not None:
            deadline = min(deadline, time.monotonic() + _CULPRIT_S)
        try:
            rank, message = self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise self._lost(self._broken or silent()) from None
        name = self._specs[rank].name
        match message:
            case None:
                how = self.processes[rank].how_it_ended()
                raise self._lost(f"{name} was lost: {how}")
            case Crashed(by_others=True):
                self._broken = f"{name} lost contact:\n{message.traceback}"
                return None
            case Crashed():
                said = f"{name} failed:\n{message.traceback}"
                raise self._lost(said, no_memory=message.no_memory)
            case _:
                return rank, message

    def _lost(self, message: str, *, no_memory: bool = False) -> WorkersLostError:
        """End what is left of the workers."""
        self.end()
        return WorkersLostError(message, no_memory=no_memory)


def _post(inbox: queue.SimpleQueue[tuple[int, Any]], rank: int, message: Any) -> None:
    inbox.put((rank, message))

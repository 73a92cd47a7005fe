"""One process of a model: it loads its part, and runs every batch through it.

The main thread computes. Another reads the connection to the driver, so that hidden states of the
next batch are received while this one computes, and so that the process ends when its driver does,
however that ended.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from stallfree.errors import CopyError, StallfreeError
from stallfree.executor.copier import BlockCopies, Copier
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
from stallfree.executor.swap_store import SwapStore
from stallfree.executor.torch_executor import TorchExecutor, memory_errors
from stallfree.model.config import ModelConfig
from stallfree.model.int8_cache import int8_weights
from stallfree.model.loading import Computation, Footprint, compile_kernels, load_decoder
from stallfree.model.peers import Alone, GroupPeers, LostContactError, contact
from stallfree.model.source import open_model

_PR_SET_PDEATHSIG = 1  # of Linux, see prctl(2)
_MEETING_S = 600.0  # others may have to be started on other machines first
_TAGS = 1 << 15  # of messages between stages, by the step they belong to


def main(connection: Connection) -> None:
    """Run the worker that a driver describes, until it closes the connection. Never returns."""
    try:
        _Worker(connection, connection.recv()).run()
    except BaseException as error:
        by_others = isinstance(error, LostContactError)
        with suppress(OSError):
            no_memory = isinstance(error, MemoryError)
            connection.send(Crashed(traceback.format_exc(), by_others, no_memory))
        if by_others:
            signal.pause()  # the driver finds out who it was, and ends all
    os._exit(1)  # without waiting for threads of the libraries


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A batch, with what it needs of the stage before under way."""

    run: Run
    hidden: torch.Tensor | None = None
    transfer: Any = None
    failure: BaseException | None = None

    def wait(self) -> torch.Tensor | None:
        """The hidden states; None for the first stage.

        Raises:
            LostContactError: the stage before cannot be reached.
        """
        if self.failure is not None:
            raise self.failure
        if self.transfer is not None:
            with contact():
                self.transfer.wait()
        return self.hidden


def _on_own_device(spec: WorkerSpec) -> Computation:
    """How the worker computes, on one GPU of its own if it is on GPUs; untested there."""
    computation = spec.computation
    if not computation.device.startswith("cuda"):
        return computation
    device = f"cuda:{spec.rank % torch.cuda.device_count()}"
    torch.cuda.set_device(device)
    return replace(computation, device=device)


class _Worker:
    def __init__(self, connection: Connection, spec: WorkerSpec) -> None:
        self._connection, self._spec = connection, spec
        self._arrived: queue.SimpleQueue[_Arrived | MakeCache | MakeSwap] = queue.SimpleQueue()
        self._copier: Copier | None = None
        self._has_failed = torch.empty(0)  # one number, of copying
        self._sent: tuple[Any, torch.Tensor] | None = None  # the last transfer and what it reads
        self._peers: Alone | GroupPeers = Alone()
        self._line: Any = None  # the group of those that hidden states are sent to and come from
        self._new_hidden: Callable[[int], torch.Tensor] | None = None

    def run(self) -> None:
        """Load, then run batches for ever."""
        threading.Thread(target=self._read, daemon=True).start()
        spec = self._spec
        torch.set_num_threads(spec.computation.threads)
        self._join()
        source = open_model(spec.model)
        config, weights = ModelConfig.from_hf(source.hf_config), source.weights
        if spec.computation.arithmetic.int8:
            weights = int8_weights(source.path, weights)
        computation = _on_own_device(spec)
        decoder = load_decoder(config, weights, computation, spec.part, self._peers)
        del source, weights
        compile_kernels(decoder)
        self._new_hidden = decoder.new_hidden
        self._connection.send(Loaded(Footprint.of(decoder)))
        wanted = self._arrived.get()
        assert isinstance(wanted, MakeCache), "no batch runs without a KV cache"
        try:
            cache = decoder.make_cache(wanted.num_blocks, wanted.block_size)
        except (RuntimeError, MemoryError) as error:
            self._connection.send(Ready(str(error)))
            signal.pause()  # until the driver ends all
        executor = TorchExecutor(decoder, cache)
        self._copier, self._has_failed = Copier(cache), decoder.new_hidden(1)[:, :1]
        self._connection.send(Ready())
        while True:
            arrived = self._arrived.get()
            if isinstance(arrived, MakeSwap):
                self._make_swap(cache, self._copier, arrived)
                continue
            assert isinstance(arrived, _Arrived), "there is one KV cache"
            self._connection.send(self._step(executor, arrived))

    def _make_swap(self, cache: Any, copier: Copier, wanted: MakeSwap) -> None:
        try:
            copier.swap = SwapStore(cache, wanted.num_slots, wanted.folder)
            times = copier.swap.measure()
        except (StallfreeError, OSError) as error:
            self._connection.send(Ready(str(error)))
            signal.pause()  # until the driver ends all
        self._connection.send(Ready(times=times))

    def _join(self) -> None:
        """Meet the other processes of the model."""
        spec = self._spec
        timeout = timedelta(seconds=2 * spec.timeout_s)  # the driver is to notice first
        start_timeout = timedelta(seconds=_MEETING_S)
        host, port = spec.store
        store = dist.TCPStore(host, port, is_master=False, timeout=start_timeout)
        backend = "nccl" if spec.computation.device.startswith("cuda") else "gloo"
        dist.init_process_group(
            backend, store=store, rank=spec.rank, world_size=spec.world_size, timeout=start_timeout
        )
        self._line = dist.new_group(timeout=timeout)
        size = spec.part.tp_size
        for first in range(0, spec.world_size, size):  # all take part in making each group
            group = dist.new_group(list(range(first, first + size)), timeout=timeout)
            if size > 1 and first <= spec.rank < first + size:
                self._peers = GroupPeers(group)

    def _read(self) -> None:
        """The reading thread."""
        try:
            while True:
                message = self._connection.recv()
                if isinstance(message, Run):
                    message = self._receive(message)
                self._arrived.put(message)
        except BaseException as error:
            if not isinstance(error, EOFError | OSError):
                traceback.print_exc()
        os._exit(0)  # the driver has gone, and so does all that it started

    def _receive(self, run: Run) -> _Arrived:
        previous = self._spec.previous
        if previous is None:
            return _Arrived(run)
        assert self._new_hidden is not None, "a batch came before the weights"
        try:
            hidden = self._new_hidden(len(run.step.input.token_ids))
            with contact():
                transfer = dist.irecv(hidden, previous, self._line, tag=run.step_id % _TAGS)
        except Exception as error:  # for the main thread to tell
            return _Arrived(run, failure=error)
        return _Arrived(run, hidden, transfer)

    def _step(self, executor: TorchExecutor, arrived: _Arrived) -> Done:
        run, output, failure = arrived.run, None, None
        no_memory = no_copy = False
        received = arrived.wait()
        started_s, hidden = time.monotonic(), None
        try:
            if any(run.step.copies):
                self._copy(run.step.copies)
            self._peers.expect(executor.exchanges(run.step))
            hidden = executor.forward(run.step, received)
            if self._spec.following is None:
                output = executor.finish(run.step, hidden)
        except LostContactError:
            raise
        except Exception as error:  # of this batch alone: the next stage is sent zeros
            no_copy, no_memory = isinstance(error, CopyError), isinstance(error, MemoryError)
            failure = traceback.format_exc()
        if failure is not None:  # the error's frames are gone, and what they held
            with memory_errors():
                self._peers.make_up()
        ended_s = time.monotonic()
        if self._spec.following is not None:
            self._send(run, hidden)
        if self._spec.part.tp_rank > 0:
            output = None  # its peers have the same
        return Done(run.step_id, started_s, ended_s, output, failure, no_memory, no_copy)

    def _copy(self, copies: BlockCopies) -> None:
        """Copy KV.

        Raises:
            CopyError: it failed here or in a process that shares the layers; in all of them alike.
        """
        assert self._copier is not None, "a batch came before the KV cache"
        failure: CopyError | None = None
        try:
            self._copier.copy(copies)
        except CopyError as error:
            failure = error
        if self._peers.largest(self._has_failed.fill_(failure is not None)).item():
            raise failure or CopyError("a process with the same layers could not copy KV")

    def _send(self, run: Run, hidden: torch.Tensor | None) -> None:
        """Send hidden states to the next stage, while the next batch computes; zeros for none."""
        if self._sent is not None:
            with contact():
                self._sent[0].wait()
        assert self._new_hidden is not None, "a batch ran before the weights were there"
        sent = self._new_hidden(len(run.step.input.token_ids))
        sent.copy_(torch.zeros(1) if hidden is None else hidden)
        following = self._spec.following
        with contact():
            transfer = dist.isend(sent, following, self._line, tag=run.step_id % _TAGS)
        self._sent = (transfer, sent)


def _end_with_parent() -> None:
    """Have Linux end this process with its parent, even while it is stopped and reads nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    _end_with_parent()
    main(Connection(int(sys.argv[1])))

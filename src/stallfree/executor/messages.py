"""What the processes of a model and their driver tell each other, over one connection each.

A worker is sent a `MakeCache` once, perhaps a `MakeSwap`, then one `Run` for each batch; the end of
the connection is its end. It answers with one `Loaded`, one `Ready` for each thing made, one `Done`
for each batch, or a `Crashed`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from stallfree.executor.output import ExecutorOutput
from stallfree.executor.step import Step
from stallfree.executor.swap_store import CopyTimes
from stallfree.model.loading import Computation, Footprint
from stallfree.model.part import ModelPart


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is started with.

    Attributes:
        rank, world_size: of all processes of the model.
        part: of the model that it runs.
        previous, following: ranks of the same share of the stages before and after, if any.
        model: path of the model's folder or file.
        store: host and port where the processes find each other.
        timeout_s: how long a message between them may take.
    """

    rank: int
    world_size: int
    part: ModelPart
    previous: int | None
    following: int | None
    model: str
    computation: Computation
    store: tuple[str, int]
    timeout_s: float

    @property
    def name(self) -> str:
        """For people."""
        layers, share = self.part.layers, ""
        if self.part.tp_size > 1:
            share = f", share {self.part.tp_rank + 1} of {self.part.tp_size}"
        return f"rank {self.rank} (layers {layers.start} to {layers.stop - 1}{share})"


@dataclass(frozen=True, slots=True)
class MakeCache:
    """The size of the KV cache, once all workers have said what a token takes."""

    num_blocks: int
    block_size: int


@dataclass(frozen=True, slots=True)
class MakeSwap:
    """The size of the swap space in blocks, and the folder of its file; None for host memory."""

    num_slots: int
    folder: Path | None


@dataclass(frozen=True, slots=True)
class Run:
    """A batch; ids count up from zero."""

    step_id: int
    step: Step


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights are in memory."""

    footprint: Footprint


@dataclass(frozen=True, slots=True)
class Ready:
    """The KV cache or the swap space is there, or `error` says why not.

    Attributes:
        times: of the swap space.
    """

    error: str | None = None
    times: CopyTimes | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A batch went through a worker.

    Attributes:
        started_s, ended_s: when it computed, by the monotonic clock of its machine.
        output: of the last stage.
        error: the traceback, if it failed.
        no_memory: whether it did for want of memory.
        no_copy: whether it did before anything ran, as KV could not be copied.
    """

    step_id: int
    started_s: float
    ended_s: float
    output: ExecutorOutput | None = None
    error: str | None = None
    no_memory: bool = False
    no_copy: bool = False


@dataclass(frozen=True, slots=True)
class Crashed:
    """The worker cannot go on.

    Attributes:
        traceback: why.
        by_others: whether it was another worker that could not be reached.
        no_memory: whether there was no memory for a batch.
    """

    traceback: str
    by_others: bool = False
    no_memory: bool = False

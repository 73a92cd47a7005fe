"""What an executor is, and what it gives back for a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from stallfree.core.batch import Batch


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Natural-log probabilities at one position, before temperature, penalties and cuts.

    Attributes:
        token_id: the token that is there.
        logprob: its log probability.
        top: the likeliest tokens with theirs, likeliest first; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled token; `logprobs` only if the request asked for them.

    If `error` says why nothing could be sampled for this request, the rest means nothing.
    """

    token_id: int
    logprobs: PositionLogprobs | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ExecutorOutput:
    """The result of a batch.

    Attributes:
        samples: one for each chunk of `Batch.sampling`, in its order.
        prompt_logprobs: by request id, for requests that asked, the prompt positions
            `chunk.start + 1` to `chunk.stop` (position 0 has no prediction), as far as they are
            in the prompt.
        failed: by request id, why a chunk could not be run even alone, while others could; its
            sample, if there is one, means nothing.
    """

    samples: tuple[Sample, ...]
    prompt_logprobs: Mapping[str, tuple[PositionLogprobs, ...]] = field(default_factory=dict)
    failed: Mapping[str, Exception] = field(default_factory=dict)


class Executor(Protocol):
    """Runs batches. It keeps nothing about a request but its KV, in the blocks of its table."""

    def execute(self, batch: Batch) -> ExecutorOutput:
        """Run `batch` and sample; after any exception, a part of it may be run again.

        Raises:
            MemoryError: there is no memory for the batch; for a smaller one there may be.
        """
        ...


class Pipeline(Protocol):
    """Runs several batches at once, each a stage further than the next.

    Attributes:
        num_stages: most batches in flight.
    """

    @property
    def num_stages(self) -> int: ...

    def submit(self, batch: Batch) -> None:
        """Start a batch; there are fewer than `num_stages` in flight."""
        ...

    def collect(self) -> ExecutorOutput:
        """Wait for the oldest batch in flight. An exception fails its requests, and only them.

        Raises:
            WorkersLostError: this and all others in flight are lost, with all KV.
        """
        ...


class WorkerPipeline(Pipeline, Executor, Protocol):
    """A pipeline of processes, which can be lost; an executor while no batch is in flight."""

    @property
    def can_swap(self) -> bool:
        """Whether it has a swap space: it may have had one before a restart."""
        ...

    def starve(self) -> None:
        """Note that there is room for a batch, but nothing to run."""
        ...

    def tend(self) -> None:
        """Notice a loss while no batch is in flight.

        Raises:
            WorkersLostError: a process has ended.
        """
        ...

    def restart(self) -> None:
        """Begin anew after a loss.

        Raises:
            WorkersLostError: it cannot.
        """
        ...

    def close(self) -> None:
        """End the processes."""
        ...

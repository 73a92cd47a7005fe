"""Joining what the processes of one stage computed: tensor parallelism's collectives.

A layer's first matrices are split by outputs and its last by inputs, so each process has a part of
every sum (Megatron-LM, arXiv 1909.08053).

All processes must make the same exchanges. One that fails amid a batch, for want of memory say,
makes the rest of them with zeros: nobody waits for it, and nothing is exchanged to find that out.
What comes of the batch then means nothing in any process, and is thrown away by whoever is told of
the failure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist


class LostContactError(Exception):
    """Another process does not answer, or has ended."""


@contextmanager
def contact() -> Iterator[None]:
    """What fails within is that others cannot be reached.

    Raises:
        LostContactError: so it is.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # all that torch.distributed raises
        raise LostContactError(str(error)) from error


@dataclass(frozen=True, slots=True)
class Exchange:
    """What each of several processes gives at once, for what all of them get.

    Attributes:
        how: which method of `Peers`.
        shape, dtype, device: of what a process gives.
    """

    how: Literal["sum", "largest", "concat"]
    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


class Peers(Protocol):
    """The processes that share the layers of a stage, this one included."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of what all of them give, of any shape; `x` may be overwritten."""
        ...

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of what all of them give, number by number; `x` may be overwritten."""
        ...

    def concat(self, x: torch.Tensor) -> torch.Tensor:
        """What all of them give, (R, n) each, side by side: (R, size * n)."""
        ...


class Alone:
    """One process for all of a layer."""

    def expect(self, exchanges: Iterable[Exchange]) -> None:
        """Nobody waits for any."""

    def make_up(self) -> None:
        """There is nothing to make up."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return x

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return x

    def concat(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor itself."""
        return x


class GroupPeers:
    """A group of torch.distributed, on the device's own backend.

    Args:
        group: all its members make the same calls in the same order.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._expected: deque[Exchange] = deque()

    def expect(self, exchanges: Iterable[Exchange]) -> None:
        """Say which exchanges a batch will take, in order, before the first of them."""
        self._expected = deque(exchanges)

    def make_up(self) -> None:
        """Make those that are still expected, with zeros, so that the peers get on.

        Raises:
            LostContactError: they cannot be reached.
        """
        while self._expected:
            missed = self._expected[0]
            zeros = torch.zeros(missed.shape, dtype=missed.dtype, device=missed.device)
            getattr(self, missed.how)(zeros)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """See `Peers`."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """See `Peers`."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def concat(self, x: torch.Tensor) -> torch.Tensor:
        """See `Peers`."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self._group))]
        with self._one():
            dist.all_gather(parts, x, group=self._group)
        return torch.cat(parts, dim=-1)

    def _reduce(self, x: torch.Tensor, operation: Any) -> torch.Tensor:
        x = x.contiguous()
        with self._one():
            dist.all_reduce(x, operation, group=self._group)
        return x

    def _one(self) -> AbstractContextManager[None]:
        """One of the exchanges that are expected, if any are."""
        if self._expected:
            self._expected.popleft()
        return contact()

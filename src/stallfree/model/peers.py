"""Joining what the processes of one stage computed: tensor parallelism's collectives.

A layer's first matrices are split by outputs and its last by inputs, so each process has a part of
every sum (Megatron-LM, arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

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
    except RuntimeError as error:  # all that torch.distributed raises
        raise LostContactError(str(error)) from error


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
        with contact():
            dist.all_gather(parts, x, group=self._group)
        return torch.cat(parts, dim=-1)

    def _reduce(self, x: torch.Tensor, operation: Any) -> torch.Tensor:
        x = x.contiguous()
        with contact():
            dist.all_reduce(x, operation, group=self._group)
        return x

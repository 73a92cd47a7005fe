"""A batch as the decoders take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one chunk: consecutive tokens of one request.

    Attributes:
        first_row: where they begin in the batch.
        start, stop: positions of the first token and after the last.
        blocks: the request's block table, for positions 0 to `stop` - 1 at least.
    """

    first_row: int
    start: int
    stop: int
    blocks: Sequence[int]

    def slots(self, block_size: int) -> torch.Tensor:
        """KV slots int64 (stop,) of all positions up to the last."""
        table = torch.tensor(self.blocks[: -(-self.stop // block_size)])
        return (table[:, None] * block_size + torch.arange(block_size)).flatten()[: self.stop]


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One batch, its chunks packed one after the other without padding.

    Attributes:
        token_ids: of all rows, T of them.
        chunks: cover the rows in order.
    """

    token_ids: Sequence[int]
    chunks: Sequence[Rows]

    def positions(self) -> torch.Tensor:
        """int64 (T,), of each token in its request."""
        return torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in self.chunks])

"""The part of a tensor that somebody wants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Cut:
    """Consecutive rows of a tensor and, if it is a matrix, consecutive columns of them.

    Rows beyond its end are left out.
    """

    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """A copy of that part, so that nothing keeps the rest in memory."""
        part = whole[self.rows]
        if whole.dim() == 2:
            part = part[:, self.columns]
        return part.clone()

    def ranges(self, shape: Sequence[int]) -> tuple[range, range]:
        """Which rows of a tensor of that shape, and which values of each row."""
        width = math.prod(shape[1:])
        columns = range(width)[self.columns] if len(shape) == 2 else range(width)
        return range(shape[0])[self.rows], columns

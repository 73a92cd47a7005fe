"""Counts of values by size, cheap enough for the engine's thread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Histogram:
    """How many values there were up to each bound.

    One thread adds. Others may read meanwhile; the newest value may be in one of the figures only.

    Args:
        bounds: ascending; beyond the last is one more bucket.

    Attributes:
        total: the values added up.
    """

    __slots__ = ("_counts", "bounds", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.total = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[int]:
        """How many values were at most each bound, and last how many there were at all."""
        return list(accumulate(self._counts))

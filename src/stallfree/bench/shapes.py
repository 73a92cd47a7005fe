"""Distributions of one length, in tokens, by their quantiles.

Drawing a length is asking for the quantile of `Random.random()`, whose numbers are the same with
every version of Python.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist
from typing import Protocol

_Z90 = NormalDist().inv_cdf(0.9)
_ABOVE_0 = 2.0**-54  # stands for a random number that is 0


class Shape(Protocol):
    """A distribution of one length."""

    @property
    def max_tokens(self) -> int | None:
        """The longest there can be; None if there is none."""
        ...

    def quantile(self, share: float) -> int:
        """The length that a share of all lengths, 0 to below 1, do not exceed."""
        ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every length from `low` to `max_tokens` is as likely."""

    low: int
    max_tokens: int

    def quantile(self, share: float) -> int:
        """See `Shape`."""
        return self.low + int(share * (self.max_tokens - self.low + 1))


@dataclass(frozen=True, slots=True)
class Zipf:
    """A length n from `low` to `max_tokens` is drawn with a weight of 1/n^exponent.

    Attributes:
        cumulative: the weights added up, relative to that of `low`.
    """

    low: int
    max_tokens: int
    cumulative: tuple[float, ...]

    @classmethod
    def of(cls, exponent: float, low: int, high: int) -> Zipf:
        """With the weights of an exponent."""
        weights = ((n / low) ** -exponent for n in range(low, high + 1))
        return cls(low, high, tuple(accumulate(weights)))

    def quantile(self, share: float) -> int:
        """See `Shape`."""
        index = bisect_right(self.cumulative, share * self.cumulative[-1])
        return self.low + min(index, len(self.cumulative) - 1)


@dataclass(frozen=True, slots=True)
class LogNormal:
    """A lognormal distribution by its median and 90th percentile, rounded to whole tokens."""

    median: float
    p90: float

    @property
    def max_tokens(self) -> None:
        """None: there is no longest."""
        return None

    def quantile(self, share: float) -> int:
        """See `Shape`."""
        deviations = NormalDist().inv_cdf(max(share, _ABOVE_0)) / _Z90
        tokens: float = self.median * (self.p90 / self.median) ** deviations
        return max(1, round(tokens))

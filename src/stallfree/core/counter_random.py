"""Random numbers without state: each is a hash of a seed and a counter.

So a seeded request draws the same numbers whatever runs beside it, and again after a preemption.
"""

from __future__ import annotations

_MASK = 2**64 - 1


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on `seed` and `index` alone."""
    return (mix(seed, index) >> 11) * 2.0**-53


def mix(seed: int, index: int) -> int:
    """A 64-bit hash of two integers: two rounds of SplitMix64 (Steele et al., OOPSLA'14)."""
    return _splitmix64(_splitmix64(seed & _MASK) ^ (index & _MASK))


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)

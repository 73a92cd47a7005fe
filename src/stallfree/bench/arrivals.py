"""When requests arrive: gaps between them drawn at random, or all the same.

`parse_arrivals` reads a spec, `ARRIVALS_HELP` lists the forms. Gaps are drawn with a mean of 1 and
divided by the rate, so another rate stretches the same pattern. They come from `Random.random()`
alone, so a seed gives the same gaps with every version of Python, on another machine up to the last
digit of a logarithm. Nothing here knows what arrives.
"""

from __future__ import annotations

import math
from itertools import accumulate
from random import Random
from statistics import NormalDist

from stallfree.errors import ConfigError

ARRIVALS_HELP = (
    "poisson; fixed, with equal gaps; gamma:BURSTINESS, the shape of gamma distributed gaps, as in "
    "vLLM: 1 is poisson, smaller is burstier (the squared coefficient of variation of the gaps is "
    "1/BURSTINESS); trace, at the times of a trace:FILE.csv."
)
FORMS = ("poisson", "fixed", "gamma:BURSTINESS", "trace")
POISSON, FIXED = 1.0, math.inf
MIN_BURSTINESS, MAX_BURSTINESS = 0.01, 1e6


def parse_arrivals(spec: str) -> float | None:
    """The burstiness of a spec, the shape of its gamma distributed gaps; None for `trace`.

    Poisson arrivals have a burstiness of 1, and equal gaps an infinite one.

    Raises:
        ConfigError: it is none of the forms, or the burstiness is out of range.
    """
    named: dict[str, float | None] = {"poisson": POISSON, "fixed": FIXED, "trace": None}
    if spec in named:
        return named[spec]
    kind, _, text = spec.partition(":")
    if kind != "gamma":
        raise ConfigError(f"arrivals is {spec!r}; it must be one of {', '.join(FORMS)}")
    try:
        burstiness = float(text)
    except ValueError:
        burstiness = math.nan
    if not MIN_BURSTINESS <= burstiness <= MAX_BURSTINESS:
        raise ConfigError(
            f"arrivals is {spec!r}; the burstiness must be a number of at least {MIN_BURSTINESS} "
            f"and at most {MAX_BURSTINESS:,.0f}"
        )
    return burstiness


def arrival_times(
    count: int, requests_per_s: float, burstiness: float, random: Random
) -> list[float]:
    """When each request arrives, in seconds; the first at 0.

    `requests_per_s` is the mean over all seeds; a draw of few requests may be off.
    """
    gaps = (_gap(burstiness, random) / requests_per_s for _ in range(count - 1))
    return list(accumulate(gaps, initial=0.0))


def _gap(burstiness: float, random: Random) -> float:
    if burstiness == FIXED:
        return 1.0
    if burstiness == POISSON:
        return -math.log1p(-random.random())
    return _gamma(burstiness, random) / burstiness


def _gamma(shape: float, random: Random) -> float:
    """A gamma variate of scale 1 by the method of Marsaglia and Tsang (2000)."""
    if shape < 1:
        factor: float = _above_0(random) ** (1 / shape)
        return _gamma(shape + 1, random) * factor
    d = shape - 1 / 3
    c = 1 / math.sqrt(9 * d)
    while True:
        x = NormalDist().inv_cdf(_above_0(random))
        v = (1 + c * x) ** 3
        if v > 0 and math.log(_above_0(random)) < x * x / 2 + d * (1 - v + math.log(v)):
            return d * v


def _above_0(random: Random) -> float:
    return max(random.random(), 2.0**-54)

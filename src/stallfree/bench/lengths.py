"""How long prompts and answers are: drawn from distributions, or taken from a recorded trace.

`parse_lengths` reads a spec, `LENGTHS_HELP` lists the forms. Nothing here knows when requests
arrive, nor what a token is.

Requests longer than a limit, such as a model's context: all lengths of the workload are scaled by
the same factor, the limit over the longest request there can be, which keeps the shape and the
ratio of prompts to answers; dropping the long ones would leave another workload. Lognormals that
have no longest request are the exception: what is over the limit is drawn again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import NamedTuple

from stallfree.bench.shapes import LogNormal, Shape, Uniform, Zipf
from stallfree.bench.trace import read_trace
from stallfree.errors import ConfigError

LENGTHS_HELP = (
    "openchat_sharegpt4 and arxiv_summarization are fitted to the datasets of the Sarathi-Serve "
    "paper; fixed:PROMPT,OUTPUT; uniform:LOW-HIGH,LOW-HIGH; zipf:EXPONENT,LOW-HIGH,LOW-HIGH, where "
    "a length n between the two is drawn with a weight of 1/n^EXPONENT; "
    "lognormal:MEDIAN/P90,MEDIAN/P90; trace:FILE.csv, with the columns num_prefill_tokens, "
    "num_decode_tokens and, if times are known, arrived_at."
)
MAX_TOKENS = 1_000_000
_MAX_EXPONENT = 100
_MAX_TRIES = 10_000  # to draw a request within the limit


class Size(NamedTuple):
    """Tokens of one request."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class DrawnLengths:
    """Prompts and answers whose lengths are drawn independently.

    Attributes:
        spec: what it was read from.
        prompt, output: how each is distributed.
        max_total_tokens: requests of more are drawn again; None if there is no such limit.
        scaled_to: what the longest request is scaled to, and every other by the same factor.
    """

    spec: str
    prompt: Shape
    output: Shape
    max_total_tokens: int | None = None
    scaled_to: int | None = None

    def draw(self, random: Random) -> Size:
        """The size of another request.

        Raises:
            ConfigError: hardly any is within the limit.
        """
        for _ in range(_MAX_TRIES):
            prompt = self.prompt.quantile(random.random())
            output = self.output.quantile(random.random())
            if self.max_total_tokens is None or prompt + output <= self.max_total_tokens:
                size = Size(prompt, output)
                longest = self._longest
                if self.scaled_to is None or longest is None:
                    return size
                return scaled(size, self.scaled_to, longest)
        raise ConfigError(
            f"workload is {self.spec!r}, but fewer than one in {_MAX_TRIES:,} of its requests have "
            f"at most {self.max_total_tokens:,} tokens in total"
        )

    def within(self, max_total_tokens: int) -> DrawnLengths:
        """The same, fitted to a limit of prompt and answer together (see the module)."""
        longest = self._longest
        if longest is None:
            return replace(self, max_total_tokens=max_total_tokens)
        return replace(self, scaled_to=max_total_tokens) if longest > max_total_tokens else self

    @property
    def _longest(self) -> int | None:
        if self.max_total_tokens is not None:
            return self.max_total_tokens
        if self.prompt.max_tokens is None or self.output.max_tokens is None:
            return None
        return self.prompt.max_tokens + self.output.max_tokens


@dataclass(frozen=True, slots=True)
class TraceLengths:
    """The requests of a trace, in its order.

    Attributes:
        spec: what it was read from.
        sizes: of each request.
        at_s: when each arrived, the first at 0; None if the trace does not tell.
    """

    spec: str
    sizes: tuple[Size, ...]
    at_s: tuple[float, ...] | None = None

    def draw(self, random: Random) -> Size:
        """The size of any of them, each as likely, however often it was drawn before."""
        return self.sizes[int(random.random() * len(self.sizes))]

    def within(self, max_total_tokens: int) -> TraceLengths:
        """The same, fitted to a limit of prompt and answer together (see the module)."""
        longest = max(sum(size) for size in self.sizes)
        if longest <= max_total_tokens:
            return self
        return replace(
            self, sizes=tuple(scaled(size, max_total_tokens, longest) for size in self.sizes)
        )


Lengths = DrawnLengths | TraceLengths

# Lognormals whose requests of at most `max_total_tokens` have the medians and P90s that the paper
# publishes (OSDI'24, table 2): prompts 1730 and 5696, answers 415 and 834; and 7059 and 12985, 208
# and 371. What is drawn again is long (36 % and 13 % of all), so the lognormals themselves are
# longer. Found by Newton's method on the four shares below the published numbers, each integrated
# numerically over the answers' distribution. The standard deviations of prompts were not fitted:
# 2055 and 3594, published are 2088 and 3638.
PRESETS: dict[str, DrawnLengths] = {
    "openchat_sharegpt4": DrawnLengths(
        "openchat_sharegpt4", LogNormal(4020.2, 40675), LogNormal(417.44, 841.39), 8192
    ),
    "arxiv_summarization": DrawnLengths(
        "arxiv_summarization", LogNormal(7887.0, 18159.7), LogNormal(208.23, 371.56), 16384
    ),
}


def scaled(size: Size, limit: int, longest: int) -> Size:
    """A request scaled as one of `longest` tokens is to `limit` (2 or more); never to nothing."""
    prompt, output = (max(1, round(tokens * limit / longest)) for tokens in size)
    output = min(output, limit - 1)
    return Size(min(prompt, limit - output), output)


def parse_lengths(spec: str) -> Lengths:
    """Read a spec: see `LENGTHS_HELP`.

    Raises:
        ConfigError: it is none, a number is out of range, or the trace cannot be read.
    """
    if spec in PRESETS:
        return PRESETS[spec]
    kind, colon, values = spec.partition(":")
    if not colon or kind not in _FORMS:
        raise ConfigError(f"workload is {spec!r}; it must be one of {', '.join(FORMS)}")
    _, read = _FORMS[kind]
    return read(spec, values)


def _fixed(spec: str, values: str) -> Lengths:
    prompt, output = _parts(spec, values, r"(\d+),(\d+)")
    return DrawnLengths(spec, _uniform_of(spec, prompt, prompt), _uniform_of(spec, output, output))


def _uniform(spec: str, values: str) -> Lengths:
    low, high, own_low, own_high = _parts(spec, values, r"(\d+)-(\d+),(\d+)-(\d+)")
    return DrawnLengths(spec, _uniform_of(spec, low, high), _uniform_of(spec, own_low, own_high))


def _zipf(spec: str, values: str) -> Lengths:
    text, *ranges = _parts(spec, values, r"(\d*\.?\d+),(\d+)-(\d+),(\d+)-(\d+)")
    exponent = float(text)
    if exponent > _MAX_EXPONENT:
        raise ConfigError(f"workload is {spec!r}; an exponent must be at most {_MAX_EXPONENT}")
    low, high = _range(spec, ranges[0], ranges[1])
    own_low, own_high = _range(spec, ranges[2], ranges[3])
    return DrawnLengths(spec, Zipf.of(exponent, low, high), Zipf.of(exponent, own_low, own_high))


def _lognormal(spec: str, values: str) -> Lengths:
    median, p90, own_median, own_p90 = _parts(spec, values, r"(\d+)/(\d+),(\d+)/(\d+)")
    return DrawnLengths(
        spec,
        LogNormal(*_range(spec, median, p90)),
        LogNormal(*_range(spec, own_median, own_p90)),
    )


def _trace(spec: str, values: str) -> Lengths:
    rows = read_trace(Path(values))
    sizes = tuple(Size(row.prompt_tokens, row.output_tokens) for row in rows)
    times = [row.at_s for row in rows if row.at_s is not None]
    at_s = tuple(each - times[0] for each in times) if times else None
    return TraceLengths(spec, sizes, at_s)


_FORMS: dict[str, tuple[str, Callable[[str, str], Lengths]]] = {
    "fixed": ("fixed:PROMPT,OUTPUT", _fixed),
    "uniform": ("uniform:LOW-HIGH,LOW-HIGH", _uniform),
    "zipf": ("zipf:EXPONENT,LOW-HIGH,LOW-HIGH", _zipf),
    "lognormal": ("lognormal:MEDIAN/P90,MEDIAN/P90", _lognormal),
    "trace": ("trace:FILE.csv", _trace),
}
FORMS = (*PRESETS, *(written for written, _ in _FORMS.values()))


def _parts(spec: str, values: str, pattern: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, values, re.ASCII)
    if match is None:
        written, _ = _FORMS[spec.partition(":")[0]]
        raise ConfigError(f"workload is {spec!r}; write it as {written}")
    return match.groups()


def _range(spec: str, low: str, high: str) -> tuple[int, int]:
    for text in (low, high):
        if len(text) > len(str(MAX_TOKENS)) or not 1 <= int(text) <= MAX_TOKENS:
            raise ConfigError(
                f"workload is {spec!r}; {text} must be at least 1 and at most {MAX_TOKENS:,} tokens"
            )
    if int(low) > int(high):
        raise ConfigError(f"workload is {spec!r}; {low} must be at most {high}")
    return int(low), int(high)


def _uniform_of(spec: str, low: str, high: str) -> Uniform:
    return Uniform(*_range(spec, low, high))

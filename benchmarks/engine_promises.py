"""What the project promises of the engine's speed and memory, from what `engine.py` measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine_loop import REQUESTS
from steps import Bounds, Case, Costs, decodes

ONE = decodes(1, 64)
LITTLE_CONTEXT, SOME_CONTEXT, LONG_CONTEXT = decodes(8, 16), decodes(8, 1000), decodes(8, 4000)
BATCHES = [decodes(count, 150) for count in (2, 4, 8, 16, 32)]
CHUNK = Case(((500, 72),))
HYBRID = Case(((150, 1),) * 8 + ((500, 64),))
PROMPT = Case(((0, 1500),), repeats=1)
CASES = [
    ONE,
    *BATCHES,
    LITTLE_CONTEXT,
    SOME_CONTEXT,
    LONG_CONTEXT,
    Case(((500, 48),)),
    Case(((500, 64),)),
    CHUNK,
    Case(((500, 128),)),
    Case(((4000, 64),)),
    HYBRID,
    PROMPT,
]


@dataclass(frozen=True, slots=True)
class Promise:
    """A number and its limit.

    Attributes:
        form: how both are shown.
        at_least: whether the limit is the least; else it is the most.
    """

    name: str
    value: float
    limit: float
    form: str = "{:.2f}"
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the number is within its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def limit_text(self) -> str:
        """The limit for people."""
        sign = "at least" if self.at_least else "at most"
        return f"{sign} {self.form.format(self.limit)}"


def promises_of_steps(times_s: Mapping[Case, float], costs: Costs, bounds: Bounds) -> list[Promise]:
    """Those that follow from the times of `CASES`."""
    one = times_s[ONE]
    read = costs.kv_bytes(LONG_CONTEXT) - costs.kv_bytes(LITTLE_CONTEXT)
    rate = read / (times_s[LONG_CONTEXT] - times_s[LITTLE_CONTEXT])
    prefill_rate = costs.operations(PROMPT) / times_s[PROMPT]
    return [
        Promise(f"{ONE.name} / reading its bytes", one * bounds.read / costs.bytes(ONE), 1.4),
        Promise(
            f"{PROMPT.name}: operations / int8 rate",
            prefill_rate / bounds.int8,
            0.6,
            "{:.0%}",
            at_least=True,
        ),
        Promise(f"{SOME_CONTEXT.name} / {ONE.name}", times_s[SOME_CONTEXT] / one, 2.0),
        Promise(f"{HYBRID.name} / {CHUNK.name}", times_s[HYBRID] / times_s[CHUNK], 1.15),
        Promise(
            f"{LONG_CONTEXT.name}: reading KV / read bandwidth",
            rate / bounds.read,
            0.5,
            "{:.0%}",
            at_least=True,
        ),
    ]


def promises_of_engine(loop: Mapping[str, Any], start: Mapping[str, Any]) -> list[Promise]:
    """Those of the loop, and of a fresh process."""
    memory = start["resident_bytes"] / (start["weight_bytes"] + start["kv_cache_bytes"])
    return [
        Promise(
            f"loop outside the executor, {REQUESTS} requests", loop["share_outside"], 0.03, "{:.1%}"
        ),
        Promise("start to the first token, s", start["first_token_s"], 6.0, "{:.1f}"),
        Promise("resident memory / (weights + KV cache)", memory, 1.5),
    ]

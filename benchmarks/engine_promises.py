"""What the project promises of the engine's speed and memory, from what `engine.py` measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine_loop import REQUESTS
from steps import Bounds, Case, Costs, decodes

MIB = 1 << 20
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
        of_medians: the same number from medians, to be seen beside it; None if it has none.
    """

    name: str
    value: float
    limit: float
    form: str = "{:.2f}"
    at_least: bool = False
    of_medians: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the number is within its limit."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def limit_text(self) -> str:
        """The limit for people."""
        sign = "at least" if self.at_least else "at most"
        return f"{sign} {self.form.format(self.limit)}"


def promises_of_steps(
    least_s: Mapping[Case, float], medians_s: Mapping[Case, float], costs: Costs, bounds: Bounds
) -> list[Promise]:
    """Those that follow from the times of `CASES`.

    Args:
        least_s: seconds of each case, by which promises are judged.
        medians_s: seconds of each case, shown beside.
        costs: of the cases.
        bounds: of the same run.
    """
    read = costs.kv_bytes(LONG_CONTEXT) - costs.kv_bytes(LITTLE_CONTEXT)

    def promise(
        name: str,
        value_of: Callable[[Mapping[Case, float]], float],
        limit: float,
        form: str = "{:.2f}",
        *,
        at_least: bool = False,
    ) -> Promise:
        return Promise(name, value_of(least_s), limit, form, at_least, value_of(medians_s))

    return [
        promise(
            f"{ONE.name} / reading its bytes",
            lambda times_s: times_s[ONE] * bounds.read / costs.bytes(ONE),
            1.4,
        ),
        promise(
            f"{PROMPT.name}: operations / {bounds.reference} (reference)",
            lambda times_s: costs.operations(PROMPT) / times_s[PROMPT] / bounds.rate,
            0.6,
            "{:.0%}",
            at_least=True,
        ),
        promise(
            f"{SOME_CONTEXT.name} / {ONE.name}",
            lambda times_s: times_s[SOME_CONTEXT] / times_s[ONE],
            2.0,
        ),
        promise(
            f"{HYBRID.name} / {CHUNK.name}",
            lambda times_s: times_s[HYBRID] / times_s[CHUNK],
            1.15,
        ),
        promise(
            f"{LONG_CONTEXT.name} minus {LITTLE_CONTEXT.name}: KV / bandwidth",
            lambda times_s: read / (times_s[LONG_CONTEXT] - times_s[LITTLE_CONTEXT]) / bounds.read,
            0.5,
            "{:.0%}",
            at_least=True,
        ),
    ]


def promises_of_engine(loop: Mapping[str, Any], start: Mapping[str, Any]) -> list[Promise]:
    """Those of the loop, and of a fresh process."""
    kv_cache, overhead = start["kv_cache_bytes"], start["overhead_bytes"]
    memory = start["resident_bytes"] / (start["weight_bytes"] + kv_cache)
    kv_mib, overhead_mib = kv_cache / MIB, overhead / MIB
    return [
        Promise(
            f"loop outside the executor, {REQUESTS} requests", loop["share_outside"], 0.03, "{:.1%}"
        ),
        Promise("start to the first token, s", start["first_token_s"], 6.0, "{:.1f}"),
        Promise(
            f"resident / (weights + {kv_mib:,.0f} MiB of KV), overhead {overhead_mib:,.0f} MiB",
            memory,
            1.5,
        ),
    ]

"""The ablation of the paper: both parts of Sarathi-Serve, and each alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PUBLISHED = {  # table 4 of the paper: median TTFT and P99 TBT, in seconds
    "openchat_sharegpt4": {
        "hybrid_only": (0.53, 0.68),
        "simple_chunking": (1.04, 0.17),
        "sarathi": (0.76, 0.14),
    },
    "arxiv_summarization": {
        "hybrid_only": (3.78, 1.38),
        "simple_chunking": (5.38, 0.20),
        "sarathi": (3.90, 0.17),
    },
}
NUMBERS = ("ttft_p50_s", "tbt_p99_s")


Rows = Sequence[dict[str, Any]]


def of_overhead(rows: Rows, *, has_overhead: bool) -> list[dict[str, Any]]:
    """Those whose iterations carry the artifact's overhead, or those that do not."""
    return [row for row in rows if row["cell"][3] == has_overhead]


def best_rates(rows: Rows) -> dict[str, float]:
    """For each dataset the rate at which the six values are nearest to the published ones.

    The paper does not tell its rate, so that one number is fitted to six.
    """
    found = {}
    for dataset in PUBLISHED:
        rates = sorted({row["cell"][2] for row in rows if row["cell"][0] == dataset})
        if rates:
            found[dataset] = min(rates, key=lambda qps: worst_error(rows, dataset, qps))
    return found


def worst_error(rows: Rows, dataset: str, qps: float) -> float:
    """The largest relative difference from a published value."""
    values = [(published, ours) for _, _, published, ours in compared(rows, dataset, qps)]
    return max(abs(ours / published - 1) for published, ours in values)


def compared(rows: Rows, dataset: str, qps: float) -> list[tuple[str, str, float, float]]:
    """Each policy and number: published, and ours at a rate."""
    made = []
    for policy, values in PUBLISHED[dataset].items():
        own = next(row for row in rows if row["cell"][:3] == [dataset, policy, qps])
        made += [
            (policy, number, published, own[number])
            for number, published in zip(NUMBERS, values, strict=True)
        ]
    return made


def keeps_order(rows: Rows, dataset: str, qps: float) -> bool:
    """Whether the policies have the published order in both numbers."""
    values = compared(rows, dataset, qps)
    for number in NUMBERS:
        own = [(published, ours) for _, name, published, ours in values if name == number]
        by_published = sorted(own)
        if by_published != sorted(own, key=lambda pair: pair[1]):
            return False
    return True

"""What a soak promises, whether its result keeps that, and the tables that say so."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from soak_client import BROKEN, FINISHED, LEFT, REFUSED

MEMORY_SHARE, WARM_UP = 0.02, 0.1


def promises(result: Mapping[str, Any], slo_ms: float) -> dict[str, tuple[bool, str]]:
    """Whether each promise was kept, and the numbers behind that."""
    server, finished = result["server"], result["client_finished"]
    ended = server["ended"]
    by_server = ended.get("stop", 0) + ended.get("length", 0)
    all_ended = sum(ended.values()) == server["added"] and not ended.get("error")
    agree = finished <= by_server <= finished + result["client_uncertain"]
    growth = memory_growth(result["memory_bytes"])
    p99, windows = result["priority"]["tbt_p99_ms"], result["priority"]["tbt_p99_ms_by_window"]
    left, unexpected = result["left_over"], result["unexpected"]
    num_broken = sum(count for _, outcome, count in result["outcomes"] if outcome == BROKEN)
    return {
        "every status as it should be": (
            not unexpected and not num_broken,
            f"{result['sent']:,} sent, {num_broken} got another"
            + (f": {unexpected}" * bool(num_broken)),
        ),
        "no iteration failed": (
            result["failed_iterations"] == 0,
            f"{server['iterations']:,} iterations, {result['failed_iterations']} failed",
        ),
        "each request ended in one way": (
            all_ended and agree,
            f"{server['added']:,} accepted, ended {ended}; clients saw {finished:,} finish",
        ),
        "memory flat within 2 %": (abs(growth) <= MEMORY_SHARE, f"{growth:+.2%}"),
        "P99 of priority within the target": (
            all(each <= slo_ms for each in windows),  # one without a token is none
            f"{p99:.0f} ms, worst window {max(windows):.0f} ms, target {slo_ms:.0f} ms",
        ),
        "nothing left over": (not left, f"{left or 'nothing'}"),
    }


def memory_growth(samples: Sequence[tuple[float, int]]) -> float:
    """By which share the last tenth is above the tenth after the warm-up; medians."""
    count = len(samples)
    tenth = max(1, count // 10)
    sizes = [size for _, size in samples]
    first = statistics.median(sizes[int(WARM_UP * count) :][:tenth])
    return statistics.median(sizes[-tenth:]) / first - 1


def table(result: Mapping[str, Any]) -> Table:
    """The promises, and whether they were kept."""
    made = Table(title="soak", title_justify="left", box=box.SIMPLE)
    for heading in ("promise", "kept", "measured"):
        made.add_column(heading)
    for name, (is_kept, words) in result["promises"].items():
        made.add_row(name, "yes" if is_kept else "NO", words)
    return made


def outcomes(result: Mapping[str, Any]) -> Table:
    """What came of the requests of each kind."""
    made = Table(title="requests", title_justify="left", box=box.SIMPLE)
    made.add_column("kind")
    columns = (FINISHED, REFUSED, LEFT, BROKEN)
    for heading in columns:
        made.add_column(heading, justify="right")
    counts = {(kind, outcome): count for kind, outcome, count in result["outcomes"]}
    for kind in sorted({kind for kind, _ in counts}):
        made.add_row(kind, *(f"{counts.get((kind, outcome), 0):,}" for outcome in columns))
    return made

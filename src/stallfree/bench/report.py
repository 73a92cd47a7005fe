"""A run in a few lines for people: tables, and notes on what to think of the numbers.

Tables are of plain text, so that a terminal and a page can both show them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stallfree.bench.metrics import SHARES, Slo, Summary, summarize
from stallfree.bench.records import Record, Results

MAX_LATENESS_S = 0.05
MAX_CPU_SHARE = 0.5
MIN_RUN_S = 1.0  # below, starting is most of what the client does
MAX_WRONG_SIZE = 0.05
MAX_TOKENS_PER_EVENT = 1.02
LATENCIES = {
    "ttft": "time to first token",
    "tbt": "time between tokens",
    "tpot": "time per output token",
    "e2e": "end to end",
    "scheduling_delay": "scheduling delay",
}


@dataclass(frozen=True, slots=True)
class Table:
    """A table of plain text; the first column holds names, the others numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def latency_table(summary: Summary) -> Table:
    """Percentiles in milliseconds of each latency that there is."""
    rows = [
        (title, *(number(values[share] * 1000, 1) for share in SHARES))
        for name, title in LATENCIES.items()
        if not math.isnan((values := summary.latencies[name])["max"])
    ]
    return Table(
        ("ms", *(share.upper() if share != "max" else share for share in SHARES)), (*rows,)
    )


def count_table(results: Results, slo: Slo | None = None) -> Table:
    """What was sent, what came of it, and how fast."""
    summary = summarize(results, slo)
    planned = len(results.workload.arrivals)
    unsent = "" if summary.num_requests == planned else f" of {planned:,} planned"
    rows = [
        ("requests sent", f"{summary.num_requests:,}{unsent}"),
        ("answered", f"{summary.num_answered:,}"),
        *((f"failed: {kind}", f"{count:,}") for kind, count in sorted(summary.failures.items())),
        ("duration", f"{number(summary.duration_s, 1)} s"),
        ("requests a second", number(summary.requests_per_s, 2)),
        ("output tokens a second", number(summary.output_tokens_per_s, 1)),
        ("all tokens a second", number(summary.total_tokens_per_s, 1)),
    ]
    if summary.num_good is not None and summary.goodput_per_s is not None and slo is not None:
        good = f"{summary.num_good:,}, {number(summary.goodput_per_s, 2)} a second"
        rows.append((f"within {slo_text(slo)}", good))
    rows += _sizes(results.records)
    rows += _client(results, summary)
    return Table(("", ""), tuple(rows))


def notes(results: Results, summary: Summary) -> list[str]:
    """What makes the numbers less than they seem, one sentence each."""
    found = []
    if not results.is_complete:
        why = results.facts.get("ended_early", "it was ended")
        num_open = sum(each.end_s is None and each.failure is None for each in results.records)
        found.append(f"the run is not complete: {why}; {num_open} requests were under way")
    found += [
        f"{count} requests failed as {kind!r}, such as: {_message(results.records, kind)}"
        for kind, count in sorted(summary.failures.items())
    ]
    late_s = summary.latencies["lateness"]["p99"]
    if late_s > MAX_LATENESS_S:
        found.append(
            f"requests were sent late, {late_s * 1000:,.0f} ms at P99: the load was not as planned"
        )
    share = cpu_share(results)
    if share is not None and share > MAX_CPU_SHARE and results.end_s >= MIN_RUN_S:
        found.append(
            f"this client used {share:.0%} of a core: latencies may be its own; use more machines"
        )
    return found + _size_notes(results.records)


def cpu_share(results: Results) -> float | None:
    """Share of one core that the load generator used; None in a simulation."""
    if results.client_cpu_s is None or results.end_s <= 0:
        return None
    return results.client_cpu_s / results.end_s


def slo_text(slo: Slo) -> str:
    """The targets as people write them."""
    targets = {"TTFT": slo.ttft_s, "TBT": slo.tbt_s}
    told = [
        f"{name} {own_s * 1000:,.0f} ms" for name, own_s in targets.items() if own_s is not None
    ]
    return " and ".join(told)


def number(value: float, digits: int) -> str:
    """A number with thousands in groups, or a dash if there is none."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else "-"


def _sizes(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Tokens as planned and as the server counted them."""
    rows = []
    for kind in ("prompt", "output"):
        planned, counted = planned_and_counted(records, kind)
        if planned:
            text = f"{planned:,} planned, {counted:,} counted ({counted / planned - 1:+.1%})"
            rows.append((f"{kind} tokens", text))
    return rows


def planned_and_counted(records: Sequence[Record], kind: str) -> tuple[int, int]:
    """Tokens of answered requests whose server counts them; `kind` is "prompt" or "output"."""
    name = f"{kind}_tokens"
    told = [each for each in records if each.failure is None and getattr(each, name) is not None]
    planned = sum(getattr(each.arrival, name) for each in told)
    return planned, sum(getattr(each, name) for each in told)


def _client(results: Results, summary: Summary) -> list[tuple[str, str]]:
    share = cpu_share(results)
    late_s = summary.latencies["lateness"]["p99"]
    rows = [] if share is None else [("client: share of a core", f"{share:.1%}")]
    if share is not None and not math.isnan(late_s):
        rows.append(("client: sent late, P99", f"{late_s * 1000:,.1f} ms"))
    return rows


def _message(records: Sequence[Record], kind: str) -> str:
    return next(
        each.failure.message for each in records if each.failure and each.failure.kind == kind
    )


def _size_notes(records: Sequence[Record]) -> list[str]:
    found = []
    for kind in ("prompt", "output"):
        planned, counted = planned_and_counted(records, kind)
        if planned and abs(counted / planned - 1) > MAX_WRONG_SIZE:
            found.append(
                f"the server counted {counted:,} {kind} tokens where {planned:,} were planned"
            )
    answered = [each for each in records if each.failure is None and each.end_s is not None]
    untold = [each for each in answered if each.output_tokens is None]
    planned = sum(each.arrival.output_tokens for each in untold)
    came = sum(len(each.token_s) for each in untold)
    if planned and came / planned < 1 - MAX_WRONG_SIZE:
        found.append(
            f"{came:,} events with tokens came where {planned:,} tokens were planned, and the "
            "server does not count them: answers are shorter, or events hold several tokens"
        )
    told = [each for each in answered if each.output_tokens is not None]
    num_tokens = sum(each.output_tokens or 0 for each in told)
    num_events = sum(len(each.token_s) for each in told)
    if num_events and num_tokens / num_events > MAX_TOKENS_PER_EVENT:
        found.append(
            f"an event brought {num_tokens / num_events:.2f} tokens on average: times between "
            "tokens, and per token, are of events"
        )
    return found

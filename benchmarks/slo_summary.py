"""The numbers of `slo.py`: what a run's records say of its targets, and how they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from load import Record, percentile
from slo_load import STEADY, TIERS, Run

TARGETS_MS = (100, 200, 500)
SETTLING_S = 5.0  # how long a neighbour counts as new


def summarize(run: Run) -> dict[str, Any]:
    """Latencies, throughput and failures until the last arriving prompt was answered.

    Gaps are those between all tokens of all requests; the time to the first token is that of
    arriving prompts; throughput counts prompts and answers of what finished within the run.
    """
    arriving = [record for record in run.records if record.kind != STEADY]
    finished = [
        record for record in run.records if not record.error and last_s(record) <= run.end_s
    ]
    tokens = sum(record.prompt_tokens + record.completion_tokens for record in finished)
    return {
        **window(run, 0, run.end_s),
        **_first_tokens(arriving),
        "arriving": len(arriving),
        "tokens_per_s": tokens / run.end_s,
        "total_s": run.end_s,
        "failures": sum(bool(record.error) for record in run.records),
        "tokens_without_event": sum(
            record.completion_tokens - len(record.token_s) for record in finished
        ),
        "client_cpu_share": run.client_cpu_s / run.end_s,
    }


def window(run: Run, start_s: float, stop_s: float) -> dict[str, Any]:
    """The time between tokens, of tokens that arrived within a part of the run."""
    times = (pairwise(record.token_s) for record in run.records)
    gaps_ms = [
        (later - earlier) * 1000
        for each in times
        for earlier, later in each
        if start_s <= later <= stop_s
    ]
    return {
        **_gaps(gaps_ms),
        "share_over": {
            str(target): _share(gap > target for gap in gaps_ms) for target in TARGETS_MS
        },
        "gaps": len(gaps_ms),
    }


def summarize_neighbour(run: Run) -> dict[str, Any]:
    """The summary, and the time between tokens before, at and after a neighbour's start."""
    summary = summarize(run)
    if run.neighbour_s is None:  # the load was over before
        return summary
    settled_s = run.neighbour_s + SETTLING_S
    windows = {
        "before": window(run, 0, run.neighbour_s),
        "first": window(run, run.neighbour_s, settled_s),
        "after": window(run, settled_s, run.end_s),
    }
    return {**summary, "neighbour_s": run.neighbour_s, "windows": windows}


def summarize_tiers(run: Run, ttft_targets_s: Mapping[str, float]) -> dict[str, Any]:
    """The summary, and of each tier how many requests there were and how they fared.

    Args:
        run: each record's kind is its tier.
        ttft_targets_s: of the tiers that have a target; a request without a token missed it.
    """
    tiers = {}
    for tier in TIERS:
        records = [record for record in run.records if record.kind == tier]
        target_s = ttft_targets_s.get(tier)
        failed = sum(bool(record.error) for record in records)
        within = _share(
            bool(record.token_s) and record.first_token_s <= (target_s or 0) for record in records
        )
        tiers[tier] = {
            "sent": len(records),
            "finished": len(records) - failed,
            "failed": failed,
            **_first_tokens(records),
            **_gaps([gap * 1000 for record in records for gap in record.gaps_s]),
            "ttft_target_s": target_s,
            "share_within": None if target_s is None else within,
        }
    return {**summarize(run), "tiers": tiers}


def best_static(runs: Sequence[Mapping[str, Any]], target_ms: float) -> Mapping[str, Any] | None:
    """The run with a static budget of most throughput whose P99 is within the target, if any is.

    Of those within 3 % of the best, the one with the largest budget: it reads prompts soonest.
    """
    within = [
        run
        for run in runs
        if run.get("budget")
        and "error" not in run
        and not run["summary"]["failures"]
        and run["summary"]["tbt_p99_ms"] <= target_ms
    ]
    rates = [float(run["summary"]["tokens_per_s"]) for run in within]
    fast = [run for run, rate in zip(within, rates, strict=True) if rate >= 0.97 * max(rates)]
    return max(fast, key=lambda run: float(run["budget"]), default=None)


def pack(record: Record) -> dict[str, Any]:
    """A record as it is stored: whole milliseconds, the first token's time and then the gaps."""
    times = [round(time * 1000) for time in record.token_s]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    made = {
        "kind": record.kind,
        "sent_ms": round(record.sent_s * 1000),
        "token_ms": [*times[:1], *gaps],
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
    }
    return {**made, "error": record.error} if record.error else made


def unpack(stored: Mapping[str, Any]) -> Record:
    """The record that was stored, its times rounded."""
    return Record(
        stored["kind"],
        stored["sent_ms"] / 1000,
        [time / 1000 for time in accumulate(stored["token_ms"])],
        stored["prompt_tokens"],
        stored["completion_tokens"],
        stored.get("error"),
    )


def last_s(record: Record) -> float:
    """When a request ended, as far as tokens tell."""
    return record.token_s[-1] if record.token_s else record.sent_s


def _gaps(gaps_ms: Sequence[float]) -> dict[str, float]:
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {f"tbt_{name}_ms": percentile(gaps_ms, share) for name, share in shares.items()}


def _first_tokens(records: Iterable[Record]) -> dict[str, float]:
    waits_s = [record.first_token_s for record in records if record.token_s]
    return {
        "ttft_p50_s": percentile(waits_s, 0.5),
        "ttft_p99_s": percentile(waits_s, 0.99),
    }


def _share(facts: Iterable[bool]) -> float:
    known = list(facts)
    return sum(known) / len(known) if known else float("nan")

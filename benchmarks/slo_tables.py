"""The tables of `slo.py`, made of stored results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Column, Table
from slo_summary import SETTLING_S, TARGETS_MS, best_static

WINDOWS = {
    "before": "before the neighbour",
    "first": f"first {SETTLING_S:.0f} s of it",
    "after": "from then to the end",
}


def tables(name: str, part: Mapping[str, Any]) -> list[Table]:
    """The tables of a part."""
    runs = part["runs"]
    match name:
        case "targets":
            return [_runs(runs, "Targets and static budgets"), _targets(runs)]
        case "contexts":
            return [_runs(runs, "Prompts four times longer")]
        case "neighbour":
            return [_windows(run) for run in runs if "windows" in run.get("summary", {})]
        case _:
            return [_tiers(run) for run in runs if "summary" in run]


def _runs(runs: Sequence[Mapping[str, Any]], title: str) -> Table:
    made = _table(
        title,
        ("server", *("TBT ms\nP50", "\nP99", "\nmax")),
        *(f"over\n{target} ms" for target in TARGETS_MS),
        *("TTFT s\nP50", "\nP99", "tokens\nper s", "total\ns"),
        caption="TBT: of all tokens as clients see them; TTFT: of the arriving prompts",
    )
    for run in sorted(runs, key=lambda run: (run["budget"] or 0, run["target_ms"] or 0)):
        if "error" in run:
            made.add_row(run["name"], "failed")
            continue
        summary = run["summary"]
        made.add_row(
            run["name"],
            *_tbt(summary),
            *(_percent(share) for share in summary["share_over"].values()),
            *_ttft(summary),
            f"{summary['tokens_per_s']:,.0f}",
            f"{summary['total_s']:.0f}",
        )
    return made


def _targets(runs: Sequence[Mapping[str, Any]]) -> Table:
    made = _table(
        "Each target against the best static budget that keeps it",
        ("target", *("P99\nms", "held")),
        *("tokens\nper s", "best\nstatic", "its\nP99", "its tokens\nper s", "ratio"),
        *("TTFT s\nP50", "its\nTTFT"),
        caption="held, kept: P99 of the time between tokens is within the target",
    )
    for run in runs:
        if not run["target_ms"] or "error" in run:
            continue
        summary, best = run["summary"], best_static(runs, run["target_ms"])
        theirs = ["none", *[""] * 3]
        if best:
            rate, its = best["summary"]["tokens_per_s"], best["summary"]["tbt_p99_ms"]
            ratio = summary["tokens_per_s"] / rate
            theirs = [str(best["budget"]), f"{its:,.0f}", f"{rate:,.0f}", f"{ratio:.2f}"]
        made.add_row(
            f"{run['target_ms']:g} ms",
            f"{summary['tbt_p99_ms']:,.0f}",
            "yes" if summary["tbt_p99_ms"] <= run["target_ms"] else "no",
            f"{summary['tokens_per_s']:,.0f}",
            *theirs,
            f"{summary['ttft_p50_s']:.1f}",
            f"{best['summary']['ttft_p50_s']:.1f}" if best else "",
        )
    return made


def _windows(run: Mapping[str, Any]) -> Table:
    target = f"{run['target_ms']:g}"
    start_s = run["summary"]["neighbour_s"]
    made = _table(
        f"A neighbour takes half a core from {start_s:.0f} s on",
        ("", *("TBT ms\nP50", "\nP99", "\nmax")),
        *(f"over\n{target} ms", "tokens"),
        caption=run["name"],
    )
    for name, words in WINDOWS.items():
        part = run["summary"]["windows"][name]
        share = _percent(part["share_over"][target])
        made.add_row(words, *_tbt(part), share, f"{part['gaps']:,}")
    return made


def _tiers(run: Mapping[str, Any]) -> Table:
    made = _table(
        "Service tiers under overload",
        ("tier", "sent", "finished", "failed"),
        *("TTFT s\nP50", "\nP99", "TTFT\ntarget s", "\nwithin", "TBT ms\nP99", "\nmax"),
        caption=run["name"],
    )
    for name, tier in run["summary"]["tiers"].items():
        target = tier["ttft_target_s"]
        made.add_row(
            name,
            *(str(tier[count]) for count in ("sent", "finished", "failed")),
            *_ttft(tier),
            *(["none", ""] if target is None else [f"{target:g}", _percent(tier["share_within"])]),
            *_tbt(tier)[1:],
        )
    return made


def _table(title: str, first: tuple[str, ...], *more: str, caption: str | None = None) -> Table:
    made = Table(
        Column(first[0], no_wrap=True),
        title=title,
        title_justify="left",
        caption=caption,
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    for header in (*first[1:], *more):
        made.add_column(header, justify="right", no_wrap=True)
    return made


def _tbt(numbers: Mapping[str, Any]) -> list[str]:
    return [_number(numbers[f"tbt_{name}_ms"], ",.0f") for name in ("p50", "p99", "max")]


def _ttft(numbers: Mapping[str, Any]) -> list[str]:
    return [_number(numbers[f"ttft_{name}_s"], ".1f") for name in ("p50", "p99")]


def _percent(share: float) -> str:
    return _number(share, ".2%")


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)

"""The pictures of `slo.py`: is the target held, in time and by setting; a neighbour; tiers.

python benchmarks/slo_picture.py benchmarks/results/slo.json docs
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from slo_load import STEADY, TIERS
from slo_summary import best_static, unpack

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, STATIC, TARGET, GREY = "#1f4e9c", "#c2410c", "#15803d", "#9aa0aa"
TIER_COLORS = {"priority": "#c2410c", "default": "#1f4e9c", "flex": "#9aa0aa"}
WIDTH_INCHES, DPI = 10.0, 200
SHOWN_MS = 200  # the target whose runs are shown in time


def draw(parts: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the pictures of these parts as PNG into a folder; gives the paths.

    A part of which nothing can be drawn, because its servers failed, has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, (file_name, make) in PICTURES.items():
        runs = [run for run in parts.get(name, {}).get("runs", []) if "error" not in run]
        if not runs:
            continue
        figure = make(runs)
        path = folder / file_name
        figure.savefig(path, dpi=DPI, facecolor="white")
        plt.close(figure)
        made.append(path)
    return made


def _targets(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """TBT over time of one target and of its best static budget, and P99 of all settings.

    If no static budget keeps the target, the one that comes nearest.
    """
    ours = [run for run in runs if run["target_ms"] == SHOWN_MS]
    static = sorted(
        (run for run in runs if run["budget"]), key=lambda run: float(run["summary"]["tbt_p99_ms"])
    )
    best = best_static(runs, SHOWN_MS)
    shown = [*ours, *([best] if best else static[:1])]
    figure: Figure = plt.figure(
        figsize=(WIDTH_INCHES, 2.4 * len(shown) + 2.8), layout="constrained"
    )
    axes = figure.subplots(len(shown) + 1, 1, squeeze=False)[:, 0]
    highest = max((run["summary"]["tbt_max_ms"] for run in shown), default=0)
    longest = max((run["summary"]["total_s"] for run in shown), default=0)
    for ax, run in zip(axes, shown, strict=False):
        _gaps_in_time(ax, run, SHOWN_MS, highest)
        ax.set_xlim(0, longest)
    _percentiles(axes[-1], runs)
    return figure


def _neighbour(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """TBT over time, the neighbour's part shaded."""
    figure: Figure = plt.figure(figsize=(WIDTH_INCHES, 3), layout="constrained")
    ax = figure.subplots()
    run = runs[0]
    summary = run["summary"]
    _gaps_in_time(ax, run, run["target_ms"], summary["tbt_max_ms"])
    ax.set_xlim(0, summary["total_s"])
    if "neighbour_s" in summary:
        start = summary["neighbour_s"]
        ax.axvspan(start, summary["total_s"], color="#f3e9d8", zorder=0)
        ax.text(start, 1, " a process takes half a core", **_top(ax))
    return figure


def _tiers(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """TTFT by arrival, and how many of each tier wait for their first token."""
    figure: Figure = plt.figure(figsize=(WIDTH_INCHES, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    summary = runs[0]["summary"]
    records = [unpack(stored) for stored in runs[0]["records"]]
    for tier in TIERS:
        color = TIER_COLORS[tier]
        of_tier = [record for record in records if record.kind == tier]
        begun = [record for record in of_tier if record.token_s]
        numbers = summary["tiers"][tier]
        target_s = numbers["ttft_target_s"]
        label = f"{tier}: {numbers['sent']} sent, {numbers['failed']} failed"
        if target_s is not None:
            label += f", {numbers['share_within']:.0%} within {target_s:g} s"
            upper.axhline(target_s, color=color, linestyle=(0, (4, 3)), linewidth=1, zorder=0)
        sent = [record.sent_s for record in begun]
        upper.scatter(sent, [record.first_token_s for record in begun], s=22, c=color, label=label)
        changes = sorted(
            [(record.sent_s, 1) for record in begun] + [(record.token_s[0], -1) for record in begun]
        )
        times, waiting = [0.0], [0]
        for time, change in changes:
            times.append(time)
            waiting.append(waiting[-1] + change)
        lower.step(times, waiting, where="post", color=color, label=tier)
    upper.set_ylabel("s to the first token", size=8)
    upper.set_title(
        "Overload: each request by its arrival; dashed: the targets of its tier",
        **_bold(),
    )
    upper.legend(frameon=False, fontsize=8, loc="upper right")
    lower.set_title("Requests that wait for their first token", **_bold())
    lower.set_xlabel("seconds", size=8)
    lower.set_xlim(0, summary["total_s"])
    for ax, room in ((upper, 1.3), (lower, 1.05)):  # above for the legend
        ax.set_ylim(0, room * ax.get_ylim()[1])
        _plain(ax)
    return figure


PICTURES = {
    "targets": ("slo.png", _targets),
    "neighbour": ("neighbour.png", _neighbour),
    "tiers": ("tiers.png", _tiers),
}


def _gaps_in_time(ax: Axes, run: Mapping[str, Any], target_ms: float, highest_ms: float) -> None:
    """A dot for each token at its arrival, as high as the time since the one before."""
    end_s = run["summary"]["total_s"]
    records = [unpack(stored) for stored in run["records"]]
    gaps = [
        (later, (later - earlier) * 1000)
        for record in records
        for earlier, later in pairwise(record.token_s)
        if later <= end_s
    ]
    color = STATIC if run["budget"] else OURS
    ax.plot(*zip(*gaps, strict=True), ".", color=color, markersize=1.5, alpha=0.4)
    ax.axhline(target_ms, color=TARGET, linewidth=1.2)
    ax.text(
        1, target_ms, f" {target_ms:g} ms", transform=ax.get_yaxis_transform(), **_small(TARGET)
    )
    arrivals = [record.sent_s for record in records if record.kind != STEADY]
    top = 1.12 * max(highest_ms, target_ms)
    ax.plot(arrivals, [top * 0.98] * len(arrivals), "|", color="black", markersize=7)
    ax.set_ylim(0, top)
    ax.set_ylabel("ms between tokens", size=8)
    ax.set_xlabel("seconds; a tick at the top: a prompt arrives", size=8)
    summary = run["summary"]
    rate = f"{summary['tokens_per_s']:,.0f} tokens/s"
    text = f"{run['name']}: P99 {summary['tbt_p99_ms']:,.0f} ms, {rate}"
    ax.set_title(text, **_bold())
    _plain(ax)


def _percentiles(ax: Axes, runs: Sequence[Mapping[str, Any]]) -> None:
    ordered = sorted(runs, key=lambda run: (run["budget"] or 0, run["target_ms"] or 0))
    values = [run["summary"]["tbt_p99_ms"] for run in ordered]
    colors = [STATIC if run["budget"] else OURS for run in ordered]
    bars = ax.bar(range(len(ordered)), values, color=colors, width=0.6)
    labels = [
        f"{value:,.0f}\n{run['summary']['tokens_per_s']:,.0f} tok/s"
        for value, run in zip(values, ordered, strict=True)
    ]
    ax.bar_label(bars, labels, padding=2, fontsize=7)
    for target in sorted({run["target_ms"] for run in ordered if run["target_ms"]}):
        own = [place for place, run in enumerate(ordered) if run["target_ms"] == target]
        ax.axhline(target, color=TARGET, linewidth=0.6, linestyle=(0, (4, 3)), zorder=0)
        ax.text(1, target, f" {target} ms", transform=ax.get_yaxis_transform(), **_small(TARGET))
        for place in own:
            ax.hlines(target, place - 0.42, place + 0.42, color=TARGET, linewidth=2)
    names = [run["name"].replace("--", "").replace(" ", "\n") for run in ordered]
    ax.set_xticks(range(len(ordered)), names, fontsize=8)
    ax.set_ylim(0, 1.25 * max(*values, *(run["target_ms"] or 0 for run in ordered)))
    ax.set_ylabel("P99 ms between tokens", size=8)
    ax.set_title("P99 of each setting, and the targets", **_bold())
    _plain(ax)
    ax.tick_params(axis="x", length=0)


def _plain(ax: Axes) -> None:
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _bold() -> dict[str, Any]:
    return {"loc": "left", "fontsize": 10, "fontweight": "bold"}


def _small(color: str) -> dict[str, Any]:
    return {"color": color, "fontsize": 8, "va": "center"}


def _top(ax: Axes) -> dict[str, Any]:
    return {"transform": ax.get_xaxis_transform(), "fontsize": 8, "va": "top"}


if __name__ == "__main__":
    source, destination = sys.argv[1:]
    stored_parts = json.loads(Path(source).read_text(encoding="utf-8"))["parts"]
    for written in draw(stored_parts, Path(destination)):
        print(written)

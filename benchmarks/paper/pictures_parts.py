"""Pictures of single iterations, of the split of a model, and of the ablation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import ablation
import matplotlib.pyplot as plt
from cells import PIPELINE_QPS, SCHEDULERS, SPLIT_QPS, SPLITS

DPI = 150
PAPER, OURS, OTHER = "#777777", "#1f4e9c", "#c2410c"
SHARES = {  # what a stage does: its colour
    "busy": "#1f4e9c",
    "idle_pb1": "#c2410c",
    "idle_pb2": "#e08a3c",
    "idle_pb3": "#f0c27b",
    "idle_no_work": "#d0d0d0",
}


def draw_step_times(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Published prefills and decodes beside ours, and what chunks cost."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, file in zip(axes, ("prefill", "decode"), strict=False):
        own = [row for row in rows if row["file"] == file]
        sizes = [int("".join(filter(str.isdigit, row["name"]))) for row in own]
        for key, label, color, style in (
            ("published_ms", "published", PAPER, "o-"),
            ("roofline_ms", "roofline", OURS, "s--"),
        ):
            ax.plot(sizes, [row[key] for row in own], style, color=color, label=label, ms=4)
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="tokens of a prompt" if file == "prefill" else "decodes",
            ylabel="ms",
        )
        ax.legend()
    whole = {}
    own = [row for row in rows if row["file"] == "chunking_overhead"]
    for row in own:
        if "at once" in row["name"]:
            whole[row["name"].split()[0]] = row
    cut = [row for row in own if "chunks" in row["name"]]
    for place, (key, label, color) in enumerate(
        (("published_ms", "published", PAPER), ("held_out_ms", "held out", OURS))
    ):
        shares = [row[key] / whole[row["name"].split()[0]][key] for row in cut]
        at = [each + 0.4 * place for each in range(len(cut))]
        axes[2].bar(at, shares, 0.38, color=color, label=label)
    names = [row["name"].replace(" in chunks of ", "\n/ ") for row in cut]
    axes[2].set_xticks([each + 0.2 for each in range(len(cut))], names, fontsize=6)
    axes[2].axhline(1.0, color="#000000", linewidth=0.8)
    axes[2].set(ylabel="time in chunks / at once", ylim=(0.5, None))
    axes[2].legend()
    _save(figure, path)


def draw_chunking(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """What chunks cost on this machine."""
    figure, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    sizes = [row["chunk"] for row in rows]
    ax.plot(sizes, [row["relative"] for row in rows], "o-", color=OURS)
    ax.axhline(1.0, color=PAPER, linestyle="--", linewidth=1)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [f"{size:,}" for size in sizes])
    ax.set(xlabel="tokens of a chunk", ylabel="time of 2,048 tokens / at once", ylim=(0, None))
    _save(figure, path)


def draw_split(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """TBT of both splits, and what stages do under each scheduler."""
    own = {tuple(row["cell"]): row for row in rows}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for split, color in zip(SPLITS, (OTHER, OURS), strict=True):
        label = "TP{} x PP{}".format(*split)
        times = [own[*split, qps]["tbt_p50_s"] * 1000 for qps in SPLIT_QPS]
        left.plot(SPLIT_QPS, times, "o-", color=color, label=label)
    left.set(xlabel="requests/s", ylabel="median TBT, ms", ylim=(0, None))
    left.legend()
    begun = [0.0] * len(SCHEDULERS)
    for share, color in SHARES.items():
        parts = [own[name, PIPELINE_QPS][share] for name in SCHEDULERS]
        label = share.replace("idle_", "").replace("_", " ")
        right.barh(SCHEDULERS, parts, left=begun, color=color, label=label)
        begun = [before + part for before, part in zip(begun, parts, strict=True)]
    right.set(xlabel=f"share of a stage's time at {PIPELINE_QPS:g} requests/s", xlim=(0, 1))
    right.invert_yaxis()
    right.legend(ncols=5, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    _save(figure, path)


def draw_ablation(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Published values beside ours."""
    rates = ablation.best_rates(rows)
    figure, axes = plt.subplots(len(rates), 2, figsize=(9, 6), layout="constrained")
    for line, (dataset, qps) in zip(axes, rates.items(), strict=True):
        values = ablation.compared(rows, dataset, qps)
        for ax, number in zip(line, ablation.NUMBERS, strict=True):
            own = [each for each in values if each[1] == number]
            for place, (label, color) in enumerate((("paper", PAPER), ("ours", OURS))):
                at = [each + 0.4 * place for each in range(len(own))]
                bars = ax.bar(at, [each[2 + place] for each in own], 0.38, color=color, label=label)
                ax.bar_label(bars, fmt="%.2f", fontsize=7)
            ax.set_xticks([each + 0.2 for each in range(len(own))], [each[0] for each in own])
            title = {"ttft_p50_s": "median TTFT, s", "tbt_p99_s": "P99 TBT, s"}[number]
            ax.set_title(f"{dataset.split('_')[0]}: {title}", fontsize=10)
    axes[0, 0].legend()
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)

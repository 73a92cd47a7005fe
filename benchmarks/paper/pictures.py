"""The pictures of the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from ablation import of_overhead
from cells import CAPACITY_SCHEDULERS, SCHEDULERS, TARGETS
from pictures_parts import DPI, draw_ablation, draw_chunking, draw_split, draw_step_times
from systems import DATASETS, SYSTEMS

COLORS = {
    "sarathi": "#1f4e9c",
    "sarathi --tbt-slo": "#0f766e",
    "vllm": "#c2410c",
    "orca": "#a16207",
    "faster_transformer": "#6b7280",
}


def draw_all(results: dict[str, Any], live: dict[str, Any], folder: Path) -> None:
    """Draw what there are results of."""
    if "capacity" in results:
        _draw_capacity(results["capacity"]["rows"], folder / "capacity.png")
    if "curve" in results:
        _draw_curve(results["curve"]["rows"], folder / "curve.png")
    if "step_times" in results:
        draw_step_times(results["step_times"], folder / "step_times.png")
    if "split" in results:
        draw_split(results["split"]["rows"], folder / "split.png")
    if "ablation" in results:
        rows = of_overhead(results["ablation"]["rows"], has_overhead=False)
        draw_ablation(rows, folder / "ablation.png")
    if live["chunking"] is not None:
        draw_chunking(live["chunking"]["rows"], folder / "chunking.png")


def _draw_capacity(rows: list[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(row["cell"][0] for row in rows))
    size = (3.5 * len(names), 6)
    figure, axes = plt.subplots(2, len(names), figsize=size, squeeze=False, layout="constrained")
    for column, name in enumerate(names):
        for line, dataset in enumerate(DATASETS):
            ax = axes[line, column]
            for place, scheduler in enumerate(CAPACITY_SCHEDULERS):
                own = [
                    sum(
                        r["qps"] or 0.0
                        for r in rows
                        if r["cell"] == [name, t, dataset, scheduler, False]
                    )
                    for t in TARGETS
                ]
                at = [target + 0.17 * (place - 2) for target in range(len(TARGETS))]
                bars = ax.bar(at, own, 0.16, color=COLORS[scheduler], label=scheduler)
                ax.bar_label(bars, fmt="%.2g", fontsize=7)
            ax.set_xticks(range(len(TARGETS)), TARGETS)
            ax.set_title(f"{name}, {dataset.split('_')[0]}", fontsize=10)
            ax.set_ylabel("requests/s" if column == 0 else "")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)


def _draw_curve(rows: list[dict[str, Any]], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for scheduler in SCHEDULERS:
        own = [row for row in rows if row["cell"][2] == scheduler]
        qps = [row["cell"][4] for row in own]
        style = {"color": COLORS[scheduler], "label": scheduler, "marker": "o", "markersize": 3}
        left.plot(qps, [row["tbt_p99_s"] for row in own], **style)
        right.plot(qps, [row["ttft_p50_s"] for row in own], **style)
    target_s = SYSTEMS["Yi-34B"].strict_s
    left.axhline(target_s, color="#777777", linestyle="--", linewidth=1)
    left.set(xlabel="requests/s", ylabel="P99 TBT, s", yscale="log")
    right.set(xlabel="requests/s", ylabel="median TTFT, s", yscale="log")
    left.legend()
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)

"""The picture of an engine's iterations: times against their floors, and against the batch.

python benchmarks/engine_picture.py benchmarks/results/engine.json docs/engine.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, FLOOR = "#1f4e9c", "#b8bcc4"
WIDTH_INCHES, HEIGHT_INCHES, DPI = 10.0, 4.6, 200


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `engine.py` and write it as PNG."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH_INCHES, HEIGHT_INCHES), width_ratios=(3, 2), layout="constrained"
    )
    _draw_floors(left, result["cases"], result["machine"]["reference"])
    _draw_batches(right, [case for case in result["cases"] if case["batch"]])
    machine = result["machine"]
    figure.suptitle(
        f"{result['model']} in {result['dtype']}, {result['threads']} threads of "
        f"{machine['cpu']}: {machine['read_gb_per_s']:.0f} GB/s read, "
        f"{machine['reference_gop_per_s']:.0f} GOP/s {machine['reference']} (reference)",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)


def _draw_floors(ax: Axes, cases: list[dict[str, Any]], reference: str) -> None:
    ratios = [case["min_ms"] / case["floor_ms"] for case in cases]
    bars = ax.barh([case["name"] for case in cases], ratios, color=OURS, height=0.7)
    labels = [
        f"{ratio:.2f}   {case['min_ms']:,.1f} ms" for ratio, case in zip(ratios, cases, strict=True)
    ]
    ax.bar_label(bars, labels, padding=3, fontsize=8)
    ax.axvline(1, color=FLOOR, linewidth=1.2, zorder=0)
    ax.set_xlim(0, 1.4 * max(ratios))
    ax.set_ylim(len(cases) - 0.4, -0.6)
    floor = f"at the read bandwidth, or at the reference rate of {reference}"
    ax.set_xlabel(f"least time / floor ({floor})", size=8)
    ax.set_title("An iteration, tokens at context", loc="left", fontsize=10, fontweight="bold")
    ax.tick_params(axis="y", length=0, labelsize=8)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)


def _draw_batches(ax: Axes, cases: list[dict[str, Any]]) -> None:
    batches = [case["batch"] for case in cases]
    for field, color, label in (("min_ms", OURS, "measured"), ("floor_ms", FLOOR, "floor")):
        ax.plot(batches, [case[field] for case in cases], "o-", color=color, label=label)
    ax.set_xscale("log", base=2)
    ax.set_xticks(batches, [str(batch) for batch in batches])
    ax.set_ylim(0)
    ax.set_xlabel("requests in the batch", size=8)
    ax.set_ylabel("ms", size=8)
    ax.set_title("Decodes at 150 tokens (1: at 64)", loc="left", fontsize=10, fontweight="bold")
    ax.tick_params(labelsize=8)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    source, destination = sys.argv[1:]
    draw(json.loads(Path(source).read_text(encoding="utf-8")), Path(destination))

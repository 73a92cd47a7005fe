"""The picture of single kernels: a panel for each linear layer, and one for attention.

python benchmarks/kernels_picture.py benchmarks/results/kernels.json docs/kernels.png
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

COLORS = ("#1f4e9c", "#c2410c", "#6b8e23", "#9a7fb8")  # ours first
FLOOR = "#8a8f98"
WIDTH_INCHES, HEIGHT_INCHES, DPI = 10.0, 6.4, 200
NUM_COLUMNS = 3


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `single_kernels.py` and write it as PNG."""
    matrices = list(dict.fromkeys(each["matrix"] for each in result["linears"]))
    figure, axes = plt.subplots(
        2, NUM_COLUMNS, figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained"
    )
    for matrix, ax in zip(matrices, axes.flat[:-1], strict=True):
        _draw_linear(ax, [each for each in result["linears"] if each["matrix"] == matrix])
    _draw_attention(axes[-1, -1], result["attention"])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    machine = result["machine"]
    figure.suptitle(
        f"Single kernels, {result['threads']} threads of {machine['cpu']}: "
        f"{machine['read_gb_per_s']:.0f} GB/s read, "
        f"{machine['reference_gop_per_s']:.0f} GOP/s {machine['reference']} (reference)",
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)


def _draw_linear(ax: Axes, records: list[dict[str, Any]]) -> None:
    kernels = list(dict.fromkeys(each["kernel"] for each in records))
    for kernel, color in zip(kernels, COLORS, strict=True):
        own = [each for each in records if each["kernel"] == kernel]
        rows = [each["rows"] for each in own]
        ax.plot(rows, [each["min_ms"] for each in own], ".-", color=color, label=kernel, lw=1.2)
    floors = [each["floor_ms"] for each in own]
    ax.plot(rows, floors, "--", color=FLOOR, label="floor", lw=1)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(rows, [str(count) for count in rows])
    ax.set_xlabel("rows", size=8)
    ax.set_ylabel("ms", size=8)
    first = records[0]
    title = f"{first['matrix']}: {first['inputs']:,} → {first['outputs']:,}"
    ax.set_title(title, loc="left", fontsize=9, fontweight="bold")
    _tidy(ax)


def _draw_attention(ax: Axes, records: list[dict[str, Any]]) -> None:
    kernels = list(dict.fromkeys(each["kernel"] for each in records))
    cases = list(dict.fromkeys(each["case"] for each in records))
    height = 0.8 / len(kernels)
    for number, kernel in enumerate(kernels):
        own = [each for each in records if each["kernel"] == kernel]
        places = [place + (number - (len(kernels) - 1) / 2) * height for place in range(len(cases))]
        ratios = [each["min_ms"] / each["floor_ms"] for each in own]
        bars = ax.barh(places, ratios, height=0.9 * height, color=COLORS[number], label=kernel)
        labels = [f"{each['min_ms']:,.2f} ms" for each in own]
        ax.bar_label(bars, labels, padding=2, fontsize=6)
    ax.axvline(1, color=FLOOR, linestyle="--", linewidth=1)
    ax.set_yticks(range(len(cases)), cases)
    ax.set_ylim(len(cases) - 0.4, -0.6)
    ax.set_xlim(0, 1.3 * max(each["min_ms"] / each["floor_ms"] for each in records))
    ax.set_xlabel("least time / floor of the kernel's own bytes", size=8)
    ax.set_title("Attention of one layer", loc="left", fontsize=9, fontweight="bold")
    ax.legend(frameon=False, fontsize=6)
    _tidy(ax)


def _tidy(ax: Axes) -> None:
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    source, destination = sys.argv[1:]
    draw(json.loads(Path(source).read_text(encoding="utf-8")), Path(destination))

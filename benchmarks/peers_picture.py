"""The picture of servers side by side: one panel a measure, one bar a server.

python benchmarks/peers_picture.py benchmarks/results/peers.json docs/peers.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

OURS, OTHERS = "#1f4e9c", "#b8bcc4"
WIDTH_INCHES, DPI = 10.0, 200
PANELS = {  # the name of a summary field: title, how a value is shown, by what it is divided
    "decode_ms": ("one client: a token, ms", "{:.0f}", 1),
    "prefill_s": ("one client: a long prompt, s", "{:.1f}", 1),
    "tbt_max_ms": ("load: longest wait for a token, s", "{:.2f}", 1000),
    "total_s": ("load: until all is answered, s", "{:.1f}", 1),
}


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `peers.py` and write it as PNG."""
    runs = [run for run in result["runs"] if "summary" in run]
    names = [run["name"] for run in runs]
    figure, axes = plt.subplots(
        1,
        len(PANELS),
        figsize=(WIDTH_INCHES, 1.2 + 0.27 * len(runs)),
        sharey=True,
        layout="constrained",
    )
    for ax, (name, (title, form, divisor)) in zip(axes, PANELS.items(), strict=True):
        values = [run["summary"][name] / divisor for run in runs]
        colors = [OURS if name == "stallfree" else OTHERS for name in names]
        bars = ax.barh(names, values, color=colors, height=0.75)
        ax.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
        ax.set_title(title, loc="left", fontsize=8, fontweight="bold")
        ax.set_xlim(0, 1.25 * max(values, default=1))
        ax.set_xticks([])
        ax.tick_params(axis="y", length=0, labelsize=8)
        ax.spines[["top", "right", "bottom"]].set_visible(False)
    axes[0].set_ylim(len(runs) - 0.4, -0.6)
    figure.suptitle(_title(result), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)


def _title(result: dict[str, Any]) -> str:
    load, machine = result["load"], result["machine"]
    return (
        f"{machine['cores']} cores of {machine['cpu']}; load: {load['clients']} clients while "
        f"{load['long_count']} prompts of {load['long_words']:,} words arrive; shorter is better"
    )


if __name__ == "__main__":
    source, destination = sys.argv[1:]
    draw(json.loads(Path(source).read_text(encoding="utf-8")), Path(destination))

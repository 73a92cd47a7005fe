"""The picture of a stall: one panel a run, one row a client, one tick a token.

python benchmarks/picture.py benchmarks/results/stall.json docs/stall.png
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEADY, LONG, STALL = "#1f4e9c", "#c2410c", "#fbd5c5"
STALL_S = 1.0  # a gap that a reader notices; shaded
WIDTH_INCHES, DPI = 10.0, 200


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw a result of `stall.py` and write it as PNG."""
    runs = result["runs"]
    ends = [time for run in runs for record in run["records"] for time in record["token_s"]]
    height = 0.9 + sum(0.7 + 0.15 * len(run["records"]) for run in runs)
    figure, axes = plt.subplots(
        len(runs),
        1,
        figsize=(WIDTH_INCHES, height),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for run, ax in zip(runs, axes[:, 0], strict=True):
        _draw_run(ax, run)
    axes[-1, 0].set_xlim(0, max(ends, default=1.0) * 1.01)
    axes[-1, 0].set_xlabel("seconds")
    figure.suptitle(_title(result["load"]), fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, facecolor="white")
    plt.close(figure)


def _draw_run(ax: Axes, run: dict[str, Any]) -> None:
    records = run["records"]
    for row, record in enumerate(records):
        times, is_long = record["token_s"], record["kind"] == "long"
        color = LONG if is_long else STEADY
        ax.eventplot(times, lineoffsets=row, linelengths=0.75, linewidths=0.7, colors=color)
        if is_long:
            ax.axvline(record["sent_s"], color=LONG, linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)
            ax.plot(
                [record["sent_s"], min(times, default=record["sent_s"])], [row, row], color=LONG
            )
        else:
            stalls = [
                (earlier, later - earlier)
                for earlier, later in pairwise(times)
                if later - earlier >= STALL_S
            ]
            ax.broken_barh(stalls, (row - 0.38, 0.76), facecolors=STALL, zorder=0)
    num_long = sum(record["kind"] == "long" for record in records)
    num_steady = len(records) - num_long
    ax.set_yticks([(num_steady - 1) / 2, num_steady + (num_long - 1) / 2])
    ax.set_yticklabels(["decoding", "long prompts"], fontsize=9)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(records) - 0.4, -0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    worst = run["summary"]["tbt_max_ms"]
    budget = f", budget {run['token_budget']}" if run.get("token_budget") else ""
    text = f"{run['name']}{budget}: longest wait for a token {worst / 1000:.2f} s"
    ax.set_title(text, loc="left", fontsize=10, fontweight="bold")


def _title(load: dict[str, Any]) -> str:
    return (
        f"Tokens of {load['clients']} clients while {load['long_count']} prompts of about "
        f"{load['long_words']:,} tokens arrive (dashed); waits over {STALL_S:.0f} s are shaded"
    )


if __name__ == "__main__":
    source, destination = sys.argv[1:]
    draw(json.loads(Path(source).read_text(encoding="utf-8")), Path(destination))

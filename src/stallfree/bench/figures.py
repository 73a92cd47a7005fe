"""The pictures of a run, as plotly figures: when its tokens came, and how its numbers spread."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

from stallfree.bench.metrics import Slo
from stallfree.bench.records import Record, Results

Runs = Sequence[tuple[str, Results]]

_TOKEN, _LATE, _WAIT, _FAILED = "#2a6fbb", "#d62728", "#cccccc", "#7f3f98"
_COLORS = ("#2a6fbb", "#e08a1e", "#3a9a5b", "#b04a9a", "#7a6a4f", "#4a8fa0")
_BINS = 100
_MAX_POINTS = 2000  # of a CDF


def timeline(results: Results, slo: Slo | None = None) -> Any:
    """Each request a row, each token a mark; gaps longer than the target in red.

    Without a target, no gap is red.
    """
    target_s = None if slo is None else slo.tbt_s
    waits: list[tuple[float, float, int]] = []
    late: list[tuple[float, float, int]] = []
    times: list[float] = []
    rows: list[int] = []
    for row, record in enumerate(results.records):
        until_s = record.token_s[0] if record.token_s else record.end_s
        if until_s is not None:
            waits.append((record.sent_s, until_s, row))
        times += record.token_s
        rows += [row] * len(record.token_s)
        if target_s is not None:
            late += [(a, b, row) for a, b in pairwise(record.token_s) if b - a > target_s]
    figure = _figure("seconds", "request", height=min(1000, 200 + 8 * len(results.records)))
    _add_lines(figure, "waiting for the first token", waits, _WAIT, 1)
    marker = {"color": _TOKEN, "size": 4}
    _add_points(figure, "token", times, rows, marker)
    if target_s is not None:
        _add_lines(figure, f"gap over {target_s * 1000:g} ms", late, _LATE, 2)
    _add_failures(figure, results.records)
    figure.update_yaxes(autorange="reversed")
    return figure


def cdf(runs: Runs, latency: str, target_s: float | None = None) -> Any:
    """The share of times that are at most so long, of "ttft" or "tbt", with the target."""
    figure = _figure("milliseconds", "share of all")
    for place, (name, results) in enumerate(runs):
        values = sorted(value * 1000 for value in _values(results.records, latency))
        shares = [(index + 1) / len(values) for index in range(len(values))]
        step = max(1, len(values) // _MAX_POINTS)
        keep = [*range(0, len(values) - 1, step), len(values) - 1] if values else []
        _add_curve(figure, name, [values[i] for i in keep], [shares[i] for i in keep], place)
    if target_s is not None:
        figure.add_vline(x=target_s * 1000, line_dash="dash", line_color=_LATE)
    figure.update_yaxes(range=[0, 1.01])
    return figure


def throughput(runs: Runs) -> Any:
    """Tokens that came in each hundredth of the longest run, a second."""
    figure = _figure("seconds", "tokens a second")
    longest_s = max(results.end_s for _, results in runs)
    width_s = longest_s / _BINS if longest_s > 0 else 1.0
    for place, (name, results) in enumerate(runs):
        num_bins = max(1, math.ceil(results.end_s / width_s))
        counts = Counter(
            min(int(each / width_s), num_bins - 1)
            for record in results.records
            for each in record.token_s
        )
        middles = [(index + 0.5) * width_s for index in range(num_bins)]
        _add_curve(figure, name, middles, [counts[i] / width_s for i in range(num_bins)], place)
    return figure


def in_flight(runs: Runs) -> Any:
    """Requests sent whose end has not come, as it changes."""
    figure = _figure("seconds", "requests")
    for place, (name, results) in enumerate(runs):
        changes = [(record.sent_s, 1) for record in results.records]
        changes += [(each.end_s, -1) for each in results.records if each.end_s is not None]
        times, counts, count = [0.0], [0], 0
        for at_s, change in sorted(changes):
            count += change
            times.append(at_s)
            counts.append(count)
        _add_curve(figure, name, times, counts, place, shape="hv")
    return figure


def _values(records: Sequence[Record], latency: str) -> list[float]:
    if latency == "ttft":
        return [each.ttft_s for each in records if each.ttft_s is not None]
    return [gap for each in records for gap in each.gaps_s]


def _figure(x: str, y: str, height: int = 400) -> Any:
    from plotly.graph_objects import Figure

    figure = Figure()
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        xaxis={"title": {"text": x}, "rangemode": "tozero"},
        yaxis={"title": {"text": y}, "rangemode": "tozero"},
    )
    return figure


def _add_lines(
    figure: Any, name: str, lines: Sequence[tuple[float, float, int]], color: str, width: float
) -> None:
    """Horizontal lines from, to, in a row; a None between two keeps them apart."""
    x: list[float | None] = []
    y: list[int | None] = []
    for start_s, stop_s, row in lines:
        x += [start_s, stop_s, None]
        y += [row, row, None]
    line = {"color": color, "width": width}
    figure.add_scattergl(x=x, y=y, mode="lines", name=name, line=line, hoverinfo="skip")


def _add_points(
    figure: Any, name: str, x: Sequence[float], y: Sequence[int], marker: dict[str, object]
) -> None:
    import numpy as np

    figure.add_scattergl(
        x=np.asarray(x, np.float32),  # a page is half as long with them
        y=np.asarray(y, np.int32),
        mode="markers",
        name=name,
        marker=marker,
        hovertemplate="%{x:.3f} s, request %{y}",
    )


def _add_failures(figure: Any, records: Sequence[Record]) -> None:
    failed = [
        (row, each.end_s or each.sent_s, each.failure)
        for row, each in enumerate(records)
        if each.failure is not None
    ]
    if failed:
        figure.add_scattergl(
            x=[end_s for _, end_s, _ in failed],
            y=[row for row, _, _ in failed],
            mode="markers",
            name="failed",
            marker={"color": _FAILED, "symbol": "x", "size": 7},
            text=[escape(f"{failure.kind}: {failure.message}") for _, _, failure in failed],
            hovertemplate="%{text}",
        )


def _add_curve(
    figure: Any,
    name: str,
    x: Sequence[float],
    y: Sequence[float],
    place: int,
    shape: str = "linear",
) -> None:
    import numpy as np

    line = {"color": _COLORS[place % len(_COLORS)], "shape": shape}
    figure.add_scatter(
        x=np.asarray(x, np.float64),
        y=np.asarray(y, np.float64),
        mode="lines",
        name=escape(name),
        line=line,
        showlegend=True,
    )

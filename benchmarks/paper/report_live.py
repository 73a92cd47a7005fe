"""The live half of the report, from results of other benchmarks; what was not run is left out."""

from __future__ import annotations

from typing import Any

from markdown_table import table

STALLS = """\
## Figure 1: generation stalls (live)

Eight answers under way, and three prompts of 1,500 tokens. The paper shows stalls of seconds for
vLLM and none for Sarathi-Serve. On this machine (`benchmarks/stall.py`,
[every token](../../../docs/stall.png)):
"""
CHUNKING = """\
## Chunking overhead (live)

A prompt of 2,048 tokens (`benchmarks/chunking.py`). In the artifact, chunks of 512 take 1.15 of
its time at once on two A100; a CPU is saturated by far smaller chunks.
"""
FREE_RIDE = """\
The free ride, on this machine: eight decodes beside a chunk of 64 take {:.2f} of a chunk of 72
(`benchmarks/engine.py`). The paper: 1,021 tokens beside three decodes take 1.00 of 1,024 tokens.
"""
REALITY = """\
## Simulation against reality

The demo model on this machine, 200 requests at random times, and the same requests simulated with
step times that were profiled before and after (`{}`), the mean of both simulations.
"""
CAPACITY = """\
## Capacity (live)

The demo model on this machine, lengths of openchat_sharegpt4 scaled to 600 tokens, and targets of 5
and 25 times a decode iteration of eight answers. Requests per second, one seed of 50 requests, to
10 % (`{}`).
"""
_STALL_COLUMNS = ("tbt_p50_ms", "tbt_p99_ms", "tbt_max_ms", "tokens_per_s")


def stalls(live: dict[str, Any]) -> list[str]:
    """Figure 1."""
    if live["stall"] is None:
        return []
    rows = [
        [run["name"], *(f"{run['summary'][key]:,.0f}" for key in _STALL_COLUMNS)]
        for run in live["stall"]["runs"]
    ]
    return [STALLS, table(["scheduler", "TBT P50 ms", "P99", "max", "tokens/s"], rows)]


def chunking(live: dict[str, Any]) -> list[str]:
    """What chunks cost, and what decodes cost beside them."""
    parts = []
    if live["engine"] is not None:
        promises = live["engine"]["promises"]
        parts += [
            FREE_RIDE.format(own["value"]) for own in promises if "chunk of 72" in own["name"]
        ]
    if live["chunking"] is not None:
        rows = [
            [f"{row['chunk']:,}", f"{row['seconds'] * 1000:,.0f}", f"{row['relative']:.2f}"]
            for row in live["chunking"]["rows"]
        ]
        parts += [CHUNKING, table(["chunk", "ms", "of reading it at once"], rows)]
    return parts


def reality(live: dict[str, Any]) -> list[str]:
    """Live runs beside their simulations."""
    if live["reality"] is None:
        return []
    rows = []
    for name, run in live["reality"]["runs"].items():
        rows += [
            [f"{name}, {kind}", *(f"{value:,.0f}" for value in run[kind].values())]
            for kind in ("live", "simulated")
        ]
        ratios = [run["simulated"][key] / run["live"][key] for key in run["live"]]
        rows.append(["ratio", *(f"{ratio:.2f}" for ratio in ratios)])
    head = ["", "TBT P50 ms", "TBT P99", "TTFT P50", "TTFT P99", "tokens/s"]
    return [REALITY.format(live["reality"]["command"]), table(head, rows)]


def capacity(live: dict[str, Any]) -> list[str]:
    """The highest rate of each scheduler under each target."""
    if live["capacity"] is None:
        return []
    targets = live["capacity"]["targets_s"]
    rows = [
        [name, *(_rate(own[target]["seeds"][0]) for target in targets)]
        for name, own in live["capacity"]["capacities"].items()
    ]
    head = ["scheduler", *(f"{name}, {value * 1000:,.0f} ms" for name, value in targets.items())]
    return [CAPACITY.format(live["capacity"]["command"]), table(head, rows)]


def _rate(seed: dict[str, Any]) -> str:
    if seed["qps"] is None:
        return f"below {seed['failed_qps']:.2g}"
    return f"{seed['qps']:.2f}" if seed["failed_qps"] else f"at least {seed['qps']:.2f}"

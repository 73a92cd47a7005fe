"""The live half of the report, from results of other benchmarks; what was not run is left out."""

from __future__ import annotations

from typing import Any

from markdown_table import COMPARED, compared, table

STALLS = """\
## Figure 1: generation stalls (live)

Eight answers under way, and three prompts of 1,500 tokens. The paper shows stalls of seconds for
vLLM and none for Sarathi-Serve. On this machine (`benchmarks/stall.py`,
[every token](../../../docs/stall.png)):
"""
STALL_RATIO = 28.3  # section 3: by how much whole prompts in a batch raise TBT, at most
STALL_WHY = (
    "a prompt of 1,500 tokens is as long as 120 iterations of decodes on this processor, which is "
    "short of arithmetic where a GPU is short of bandwidth"
)
CHUNKING = """\
## Chunking overhead (live)

A prompt of 2,048 tokens (`benchmarks/chunking.py`). In the artifact, chunks of 512 take 1.15 of
its time at once on two A100.

![what chunks cost here](chunking.png)
"""
PUBLISHED_CHUNKS = {512: 1.15, 1024: 1.18}  # of the artifact's 2,048 tokens at once
CHUNK_WHY = "a processor's cores are full with a few dozen rows, and weights are read from memory"
FREE_RIDE = """\
The free ride, on this machine: eight decodes beside a chunk of 64 take {:.2f} of a chunk of 72
(`benchmarks/engine.py`). The paper: 1,021 tokens beside three decodes take 1.00 of 1,024 tokens.
"""
REALITY = """\
## Simulation against reality

The demo model on this machine, 200 requests at random times (`{}`), and the same requests
simulated, as simulated / live. "Profile": step times of `stallfree profile`, where nothing but the
model runs. "Others": fitted to the iterations that the servers of the two other live runs noted
(`--iteration-file`), so that they hold the processor time of HTTP and of the client. "Speed": the
same times one number that is taken from the live run itself: how long all its iterations took over
what was predicted, for the machine's speed drifts ({}).
"""
CAPACITY = """\
## Capacity (live)

The demo model on this machine, lengths of openchat_sharegpt4 scaled to 600 tokens, and targets of 5
and 25 times a decode iteration of eight answers. Requests per second; one seed, at least {}
requests and a minute of arrivals, to {:.0%} (`{}`). {}
"""
CLIENTS = """\
## Two load generators (live)

`stallfree bench serve` and `vllm bench serve` ({}) against one server at the same time, each in the
gaps of the other: {} tokens in, {} out, {:g} requests a second each, medians of {} rounds of {}
requests (`benchmarks/load_generators.py`).
"""
_STALL_COLUMNS = ("tbt_p50_ms", "tbt_p99_ms", "tbt_max_ms", "tokens_per_s")
_KINDS = ("profile", "others", "speed")


def stalls(live: dict[str, Any]) -> list[str]:
    """Figure 1."""
    if live["stall"] is None:
        return []
    runs = {run["name"]: run["summary"] for run in live["stall"]["runs"]}
    rows = [[name, *(f"{own[key]:,.0f}" for key in _STALL_COLUMNS)] for name, own in runs.items()]
    head = ["scheduler", "TBT P50 ms", "P99", "max", "tokens/s"]
    ratio = runs["orca"]["tbt_max_ms"] / runs["orca"]["tbt_p50_ms"]
    longest = ["longest iteration with a whole prompt, over a decode's"]
    longest += compared(STALL_RATIO, ratio, ".1f", STALL_WHY)
    return [STALLS, table(head, rows), table(["", *COMPARED], [longest])]


def chunking(live: dict[str, Any]) -> list[str]:
    """What chunks cost, and what decodes cost beside them."""
    parts = []
    if live["engine"] is not None:
        promises = live["engine"]["promises"]
        parts += [
            FREE_RIDE.format(own["value"]) for own in promises if "chunk of 72" in own["name"]
        ]
    if live["chunking"] is not None:
        rows = []
        for row in live["chunking"]["rows"]:
            published, own = PUBLISHED_CHUNKS.get(row["chunk"]), row["relative"]
            cells = ["", f"{own:.2f}", "", ""]
            if published is not None:
                cells = compared(published, own, ".2f", CHUNK_WHY)
            rows.append([f"{row['chunk']:,}", f"{row['seconds'] * 1000:,.0f}", *cells])
        parts += [
            CHUNKING,
            table(["chunk", "ms", "of reading it at once: paper", *COMPARED[1:]], rows),
        ]
    return parts


def reality(live: dict[str, Any]) -> list[str]:
    """Live runs beside their simulations."""
    if live["reality"] is None:
        return []
    rows, speeds = [], []
    for name, run in live["reality"]["runs"].items():
        rows.append([f"{name}, live", *(f"{value:,.0f}" for value in run["live"].values())])
        for kind in _KINDS:
            ratios = [run[kind][key] / run["live"][key] for key in run["live"]]
            rows.append([f"{name}, {kind}", *(f"{ratio:.2f}" for ratio in ratios)])
        speeds.append(f"{name} {run['slower than the others']:.2f}")
    head = ["", "TBT P50 ms", "TBT P99", "TTFT P50", "TTFT P99", "tokens/s"]
    text = REALITY.format(live["reality"]["command"], ", ".join(speeds))
    return [text, table(head, rows)]


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
    own = live["capacity"]
    text = CAPACITY.format(*(own[key] for key in ("requests", "precision", "command")), own["note"])
    return [text.replace(" \n", "\n"), table(head, rows)]


def _rate(seed: dict[str, Any]) -> str:
    if seed["qps"] is None:
        return f"below {seed['failed_qps']:.2g}"
    return f"{seed['qps']:.2f}" if seed["failed_qps"] else f"at least {seed['qps']:.2f}"


def clients(live: dict[str, Any]) -> list[str]:
    """Two load generators against one server."""
    found = live["load_generators"]
    if found is None:
        return []
    load, (ours, theirs) = found["load"], found["medians"].values()
    rows = [
        [number, f"{ours[number]:,.1f}", f"{theirs[number]:,.1f}", f"{ratio:.3f}"]
        for number, ratio in found["ratios"].items()
    ]
    count = len(next(iter(found["runs"].values())))
    size = (load["prompt"], load["output"], load["qps"], count, load["n"])
    head = ["", *found["runs"], "ours / theirs"]
    return [CLIENTS.format(found["client"], *size), table(head, rows)]

"""What the report says of pipelines and of the ablation."""

from __future__ import annotations

from typing import Any

import ablation
from cells import PIPELINE_QPS, SCHEDULERS, SPLIT_QPS, SPLITS
from markdown_table import COMPARED, compared, table
from sweeps import ABLATION_REQUESTS, ABLATION_SEEDS

SPLIT = """\
## Tensor against pipeline parallelism, and bubbles (simulated)

Falcon-180B on two nodes with 100 Gbit/s between them, budget 512: median TBT in ms when it is split
eight ways across the nodes, and 4 x 2. The paper: TP8 has more than twice that of TP4 x PP2.

![TBT of both splits, and what stages do](split.png)
"""
PUBLISHED_SPLIT = 2.0
SPLIT_WHYS = {  # by rate
    0.3: "most iterations hold decodes alone: few bytes are added up over the network, and TP8 has "
    "the bandwidth of eight devices for each token",
    1.2: "both are beyond their capacity: every iteration holds a whole chunk",
}
BUBBLES = """\
What the stages of TP4 x PP2 do at {:g} requests/s, under relaxed budgets. PB1: prefills of
different lengths follow each other; PB2: a prefill beside decodes; PB3: contexts alone differ. The
paper gives no numbers but the bubble above. `vllm` idles twice as long as `sarathi`. Small and
equal iterations leave the fewest: at 0.8 requests/s PB1 and PB2 are 10 % of the time with 512
tokens, 16 % with 2,048 and 26 % with a target of 1 s.
"""
ABLATION = """\
## Ablation (simulated)

Yi-34B, {requests} requests, budget 512, means of {seeds} seeds. The paper does not tell its rate:
for each dataset it is the one at which the six values are nearest to the published ones.

![the ablation](ablation.png)
"""
SHORT_ITERATIONS = "iterations are shorter than in the paper without the artifact's overhead"
ABLATION_WHYS = {  # by number
    "ttft_p50_s": "the published times are longer than reading one prompt of 7,059 tokens (1.6 s "
    "alone, in the artifact too) and a queue at this rate explain; a higher rate makes P99 TBT of "
    "hybrid_only too long: the two ask for different rates",
    "tbt_p99_s": "whole prompts of the longest percent (16,000 tokens, 4 s) stall decodes; fewer "
    "do at a lower rate, at which TTFT is too short: as above",
}


def split(stored: dict[str, Any]) -> list[str]:
    """TP8 against TP4 x PP2, and bubbles under each scheduler."""
    own = {tuple(row["cell"]): row for row in stored["rows"]}
    splits = []
    for qps in SPLIT_QPS:
        wide, piped = (own[*split, qps]["tbt_p50_s"] * 1000 for split in SPLITS)
        _, ours, ratio, why = compared(
            PUBLISHED_SPLIT, wide / piped, ".2f", SPLIT_WHYS.get(qps, "")
        )
        far = ["", ""] if wide / piped >= PUBLISHED_SPLIT else [ratio, why]
        cells = [f"{wide:,.0f}", f"{piped:,.0f}", f"over {PUBLISHED_SPLIT:g}", ours, *far]
        splits.append([f"{qps:g}", *cells])
    shares = ("busy", "idle_pb1", "idle_pb2", "idle_pb3", "idle_no_work")
    idle = []
    for each in SCHEDULERS:
        point = own[each, PIPELINE_QPS]
        numbers = [f"{point[share]:.1%}" for share in shares]
        idle.append([each, *numbers, f"{point['tbt_p99_s'] * 1000:,.0f}"])
    titles = ["requests/s", "TP8 ms", "TP4 x PP2 ms", "TP8 over it: paper", *COMPARED[1:]]
    head = ["scheduler", "busy", "PB1", "PB2", "PB3", "no work", "P99 TBT ms"]
    return [SPLIT, table(titles, splits), BUBBLES.format(PIPELINE_QPS), table(head, idle)]


def _why(policy: str, number: str) -> str:
    is_chunked = number == "tbt_p99_s" and policy != "hybrid_only"
    return SHORT_ITERATIONS if is_chunked else ABLATION_WHYS[number]


def ablations(stored: dict[str, Any]) -> list[str]:
    """Both parts of Sarathi-Serve, and each alone."""
    parts = [ABLATION.format(requests=ABLATION_REQUESTS, seeds=len(ABLATION_SEEDS))]
    titles = dict(zip(ablation.NUMBERS, ("TTFT P50 s", "TBT P99 s"), strict=True))
    for has_overhead in (False, True):
        rows = ablation.of_overhead(stored["rows"], has_overhead=has_overhead)
        if not rows:
            continue
        kind = "with the artifact's overhead" if has_overhead else "without overhead"
        for dataset, qps in ablation.best_rates(rows).items():
            lines = [
                [policy, titles[number], *compared(published, own, ".2f", _why(policy, number))]
                for policy, number, published, own in ablation.compared(rows, dataset, qps)
            ]
            order = "is kept" if ablation.keeps_order(rows, dataset, qps) else "IS NOT KEPT"
            parts += [
                f"{dataset} at {qps:g} requests/s, {kind}; the order of the policies {order}:\n",
                table(["policy", "number", *COMPARED], lines),
            ]
    return parts

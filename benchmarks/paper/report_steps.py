"""What the report says of single iterations: published times, and those that the paper names."""

from __future__ import annotations

from typing import Any

from markdown_table import COMPARED, NEAR, compared, table

STEP_TIMES = """\
## Step times of Yi-34B on two A100, and the free ride of hybrid batches

"Held out" is a model fitted to the three other files of the artifact. "Roofline" has the artifact's
overhead: 0.78 ms a layer at least and 1 ms a request (`--launch-us 780 --sequence-us 1000`). The
time of 256 tokens, which is above that of 512, is left out.

![published step times and ours, and what chunks cost](step_times.png)

Chunking overhead, of which "held out" has seen nothing:
"""
PREFILLS = """\
Prefills:
"""
HYBRIDS = """\
The free ride: 1,021 tokens beside three decodes take as long as 1,024 tokens alone.
"""
DECODES = """\
Decodes:
"""
WHYS = {  # by file and kind of prediction
    ("prefill", "held_out"): "no other file has fewer than 512 tokens of a prompt",
    ("hybrid", "held_out"): "the artifact has two times for four decodes, 48.8 and 68.1 ms",
    ("hybrid", "roofline"): "the artifact has two times for four decodes, 48.8 and 68.1 ms",
    ("decode", "held_out"): "the other files hold no more than four decodes: a guess beyond",
    ("decode", "roofline"): "the artifact jumps by 21 ms from 4 to 8 decodes, no byte explains it",
}
ITERATIONS = """\
## Iterations that the paper names (simulated, without the artifact's overhead)

A strict target is five iterations of 32 decodes at 4,096 tokens of context; a prompt of 4,096 takes
Falcon-180B about 1,150 ms and a batch of decodes about 200, which leaves a bubble of 950 ms.
"""
ITERATION_WHYS = {
    "LLaMA2-70B": "reading weights and KV at 80 % of the bandwidth takes ours; the rest must be "
    "spent beside the devices: the artifact's overhead (0.78 ms a layer, 1 ms a request) is 94 ms",
    "Falcon-180B": "as above: the bytes take ours, the prototype's processor the rest",
    "bubble": "with 37 ms a stage for the decodes (above), the published prompt would leave 1,113",
}


def step_times(rows: list[dict[str, Any]]) -> list[str]:
    """All published step times."""

    def of_file(name: str) -> str:
        lines = []
        for row in rows:
            if row["file"] != name:
                continue
            published = row["published_ms"]
            whys: dict[str, None] = {}  # each once
            cells = [row["name"], f"{published:,.1f}"]
            for kind in ("held_out", "roofline"):
                own = row[f"{kind}_ms"]
                cells.append(f"{own:,.1f} ({own / published:.2f})")
                if abs(own / published - 1) > NEAR:
                    whys[WHYS[name, kind]] = None
            lines.append([*cells, "; ".join(whys)])
        head = ["batch", "published ms", "held out (ratio)", "roofline (ratio)", COMPARED[-1]]
        return table(head, lines)

    return [
        *(STEP_TIMES, of_file("chunking_overhead"), PREFILLS, of_file("prefill")),
        *(HYBRIDS, of_file("hybrid"), DECODES, of_file("decode")),
    ]


def iterations(rows: list[dict[str, Any]]) -> list[str]:
    """Iterations that targets and bubbles are made of."""
    lines = []
    for row in rows:
        name = row["name"]
        why = next((ITERATION_WHYS[key] for key in ("bubble", *ITERATION_WHYS) if key in name), "")
        cells = compared(row["published_ms"], row["roofline_ms"], ",.0f", why)
        lines.append([name, *cells])
    return [ITERATIONS, table(["iteration, ms", *COMPARED], lines)]

"""What chunks cost, live: a prompt of 2,048 tokens read at once and in chunks, on this machine.

    python benchmarks/chunking.py

Smaller chunks read the KV cache of those before once more each, and fill the kernels' tiles less
well. Takes about a minute. Prints a table, and writes benchmarks/results/chunking.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table
from server import machine_facts

from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
from stallfree.engine.profile_batches import Composition, measure
from stallfree.engine.settings import EngineSettings

ROOT = Path(__file__).parent.parent
PROMPT_TOKENS = 2048
CHUNKS = (32, 64, 96, 128, 256, 512, 1024, 2048)
ROUNDS = 3


def main() -> int:
    """Measure all sizes."""
    engine = build_engine(EngineSettings())
    seconds = {size: _seconds(engine, size) for size in CHUNKS[::-1]}
    whole_s = seconds[PROMPT_TOKENS]
    rows = [
        {"chunk": size, "seconds": seconds[size], "relative": seconds[size] / whole_s}
        for size in CHUNKS
    ]
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": machine_facts(),
        "prompt_tokens": PROMPT_TOKENS,
        "rows": rows,
    }
    path = ROOT / "benchmarks" / "results" / "chunking.json"
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    table = Table(title=f"a prompt of {PROMPT_TOKENS:,} tokens", box=box.SIMPLE)
    for title in ("chunk", "ms", "of reading it at once"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(
            f"{row['chunk']:,}", f"{row['seconds'] * 1000:,.0f}", f"{row['relative']:.2f}"
        )
    Console().print(table)
    return 0


def _seconds(engine: Engine, size: int) -> float:
    """All chunks of the prompt, one after the other; the median of the rounds."""
    chunks = [
        Composition(chunk_start=start, chunk_tokens=min(size, PROMPT_TOKENS - start))
        for start in range(0, PROMPT_TOKENS, size)
    ]
    facts = engine.facts
    measured = measure(engine.executor, engine.scheduler.pool, facts.vocab_size, chunks, ROUNDS)
    rounds = [measured[i : i + len(chunks)] for i in range(0, len(measured), len(chunks))]
    return median(sum(seconds for _, seconds in each) for each in rounds)


if __name__ == "__main__":
    sys.exit(main())

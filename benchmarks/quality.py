"""What int8 costs in quality: perplexity and argmax agreement against float32, on a fixed text.

    python benchmarks/quality.py               # the demo model
    python benchmarks/quality.py MODEL         # another

The text is this repository's own prose and code, cut to the first tokens of each.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from server import machine_facts

from stallfree import LLM, SamplingParams
from stallfree.executor.output import PositionLogprobs

ROOT = Path(__file__).parent.parent
TEXTS = ("LICENSE", "Makefile", "src/stallfree/core/blocks.py", "src/stallfree/core/request.py")
TOKENS_EACH = 1024
DTYPES = ("float32", "int8")


def main() -> None:
    """Score the texts under each dtype and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/quality.json")
    options = parser.parse_args()
    scores = {}
    for dtype in DTYPES:
        print(f"{dtype}: scoring", file=sys.stderr)
        scores[dtype] = score(options.model, dtype)
    rows = [summarize(dtype, scores[dtype], scores[DTYPES[0]]) for dtype in DTYPES]
    result = {"machine": machine_facts(), "model": options.model or "demo", "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = Table(*rows[0], box=box.SIMPLE)
    for row in rows:
        table.add_row(
            *(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        )
    Console().print(table)


def score(model: str | None, dtype: str) -> list[PositionLogprobs]:
    """Log probabilities of all tokens of the texts but the first of each."""
    llm = LLM(model, dtype=dtype, kv_cache_memory_bytes=1 << 28, token_budget=256)
    prompts = [
        llm.tokenizer.encode((ROOT / name).read_text(encoding="utf-8"))[:TOKENS_EACH]
        for name in TEXTS
    ]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=1))
    return [p for output in outputs for p in output.prompt_logprobs or () if p is not None]


def summarize(
    dtype: str, scores: list[PositionLogprobs], exact: list[PositionLogprobs]
) -> dict[str, Any]:
    """Perplexity, its ratio to that of the exact scores, and how often the likeliest agree."""
    perplexity = math.exp(-sum(p.logprob for p in scores) / len(scores))
    reference = math.exp(-sum(p.logprob for p in exact) / len(exact))
    agree = sum(a.top[0][0] == b.top[0][0] for a, b in zip(scores, exact, strict=True))
    return {
        "dtype": dtype,
        "tokens": len(scores),
        "perplexity": perplexity,
        "ratio": perplexity / reference,
        "argmax agreement": agree / len(scores),
    }


if __name__ == "__main__":
    main()

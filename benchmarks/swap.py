"""What keeping preempted requests saves: one load under memory pressure, three ways.

    python benchmarks/swap.py             # the demo model: some four minutes on two cores
    python benchmarks/swap.py --quick     # fewer and shorter requests, stored nowhere

All requests are there from the beginning and begin differently; the KV cache holds less than half
of what they come to, so that some are preempted as others grow. The same is run with recompute, and
with swap to host memory and to a file. Answers are greedy, so in int8 all must be the same. Prints
a table, and writes benchmarks/results/swap.json; the exit code is 1 if answers differ.
"""

from __future__ import annotations

import stallfree  # noqa: F401  # before torch: it says how long idle threads spin

# isort: split
import argparse
import json
import random
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from server import machine_facts

from stallfree.core.sampling_params import SamplingParams
from stallfree.engine.build import build_engine
from stallfree.engine.meter import Meter
from stallfree.engine.settings import EngineSettings
from stallfree.errors import StallfreeError

ROOT = Path(__file__).parent.parent
TABLE_WIDTH = 110  # also where the output is no terminal


@dataclass(frozen=True, slots=True)
class Load:
    """What is run.

    Attributes:
        requests: all at once.
        prompt_tokens, output_tokens: of each.
        kv_tokens: that the KV cache holds.
    """

    requests: int = 16
    prompt_tokens: int = 300
    output_tokens: int = 200
    kv_tokens: int = 2560

    @property
    def least_read(self) -> int:
        """Tokens that are read if nothing is computed again."""
        return self.requests * self.prompt_tokens


def main() -> int:
    """Measure all three."""
    options = _options()
    load = Load(6, 60, 60, 320) if options.quick else Load()
    settings = EngineSettings(model=options.model, dtype=options.dtype, threads=options.threads)
    try:
        facts = build_engine(replace(settings, kv_cache_memory_bytes=1 << 22)).facts
        token_bytes = facts.kv_cache_bytes // facts.kv_cache_tokens
        settings = replace(settings, kv_cache_memory_bytes=load.kv_tokens * token_bytes)
        space = load.requests * (load.prompt_tokens + load.output_tokens) * token_bytes
        swap = replace(settings, preemption_mode="swap", swap_space_bytes=space)
        rows = {
            "recompute": measure(settings, load),
            "swap, host memory": measure(swap, load),
            "swap, file": measure(replace(swap, swap_dir=options.swap_dir), load),
        }
    except StallfreeError as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    texts = [row.pop("tokens") for row in rows.values()]
    is_same = all(each == texts[0] for each in texts)
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_facts(),
        "model": facts.model_name,
        "dtype": facts.dtype,
        "load": asdict(load),
        "same_answers": is_same,
        "rows": rows,
    }
    if not options.quick:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.json}", file=sys.stderr)
    Console(width=TABLE_WIDTH).print(table(load, rows, is_same=is_same))
    return 0 if is_same else 1


def measure(settings: EngineSettings, load: Load) -> dict[str, Any]:
    """Run the load on an engine of its own."""
    engine = build_engine(settings)
    meter = Meter()
    engine.observers.add(meter)
    params = SamplingParams(temperature=0, max_tokens=load.output_tokens, ignore_eos=True)
    rng = random.Random(0)
    for number in range(load.requests):
        prompt = rng.choices(range(engine.vocab_size), k=load.prompt_tokens)
        engine.add(str(number), prompt, params)
    tokens: dict[str, list[int]] = {str(number): [] for number in range(load.requests)}
    started = time.perf_counter()
    while engine.has_requests:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
    seconds = time.perf_counter() - started
    scheduler, swap = engine.scheduler, engine.scheduler.swap
    return {
        "seconds": seconds,
        "tokens_per_s": meter.num_output_tokens / seconds,
        "read_again": meter.num_prompt_tokens - load.least_read,
        "preemptions": scheduler.preemptions.total(),
        "swapped": scheduler.swapped.total(),
        "blocks_out": swap.num_out if swap else 0,
        "blocks_in": swap.num_in if swap else 0,
        "tokens": tokens,
    }


def table(load: Load, rows: dict[str, dict[str, Any]], *, is_same: bool) -> Table:
    """A line for each way."""
    answers = "the same answers" if is_same else "ANSWERS DIFFER"
    caption = (
        f"{load.requests} requests of {load.prompt_tokens} + {load.output_tokens} tokens on a KV "
        f"cache of {load.kv_tokens:,} tokens; {answers}"
    )
    made = Table(box=box.SIMPLE, caption=caption)
    titles = ("preemption", "output tokens/s", "ratio", "tokens computed again")
    for title in (*titles, "preemptions", "kept", "blocks out", "blocks in"):
        is_name = title == titles[0]
        made.add_column(title, justify="left" if is_name else "right", no_wrap=is_name)
    base = rows["recompute"]["tokens_per_s"]
    for name, row in rows.items():
        made.add_row(
            name,
            f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_s'] / base:.2f}",
            f"{row['read_again']:,}",
            f"{row['preemptions']}",
            f"{row['swapped']}",
            f"{row['blocks_out']:,}",
            f"{row['blocks_in']:,}",
        )
    return made


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="the demo model if it is left out")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--swap-dir", type=Path, default=ROOT, help="where the file is")
    parser.add_argument("--quick", action="store_true", help="small, and stored nowhere")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/swap.json")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

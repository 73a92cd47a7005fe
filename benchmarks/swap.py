"""What keeping preempted requests saves: one load under memory pressure, three ways.

    python benchmarks/swap.py             # the demo model: some two minutes on two cores
    python benchmarks/swap.py --quick     # fewer and shorter requests, stored nowhere

All requests are there from the beginning and begin differently; the KV cache holds less than half
of what they come to, so that some are preempted as others grow. The same is run with recompute, and
with swap to host memory and to a file, by three engines that take turns, an iteration each: so
whatever else the machine does meets all of them alike. Answers are greedy, so in int8 all must be
the same. Prints a table, and writes benchmarks/results/swap.json; the exit code is 1 if answers
differ.
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

from rich import box
from rich.console import Console
from rich.table import Table
from server import machine_facts

from stallfree.core.sampling_params import SamplingParams
from stallfree.engine.build import build_engine
from stallfree.engine.engine import Engine
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

    requests: int = 10
    prompt_tokens: int = 400
    output_tokens: int = 150
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
        ways = {
            "recompute": settings,
            "swap, host memory": swap,
            "swap, file": replace(swap, swap_dir=options.swap_dir),
        }
        runs = {name: Run(build_engine(each), load) for name, each in ways.items()}
    except StallfreeError as error:
        print(f"the benchmark failed: {error}", file=sys.stderr)
        return 1
    goes_on = True
    while goes_on:
        goes_on = False
        for run in runs.values():
            goes_on |= run.step()
    rows = {name: run.row() for name, run in runs.items()}
    is_same = all(run.tokens == runs["recompute"].tokens for run in runs.values())
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


class Run:
    """The load on an engine of its own.

    Attributes:
        tokens: of the answers.
    """

    def __init__(self, engine: Engine, load: Load) -> None:
        self.tokens: dict[str, list[int]] = {str(number): [] for number in range(load.requests)}
        self._engine, self._load = engine, load
        self._meter, self._seconds = Meter(), 0.0
        engine.observers.add(self._meter)
        params = SamplingParams(temperature=0, max_tokens=load.output_tokens, ignore_eos=True)
        rng = random.Random(0)
        for name in self.tokens:
            engine.add(name, rng.choices(range(engine.vocab_size), k=load.prompt_tokens), params)

    def step(self) -> bool:
        """Run an iteration, if there is one left to run."""
        if not self._engine.has_requests:
            return False
        started = time.perf_counter()
        deltas = self._engine.step()
        self._seconds += time.perf_counter() - started
        for delta in deltas:
            self.tokens[delta.request_id] += delta.token_ids
        return True

    def row(self) -> dict[str, float]:
        """What it took."""
        scheduler = self._engine.scheduler
        swap = scheduler.swap
        return {
            "seconds": self._seconds,
            "tokens_per_s": self._meter.counts.num_output_tokens / self._seconds,
            "read_again": self._meter.counts.num_prompt_tokens - self._load.least_read,
            "preemptions": scheduler.preemptions.total(),
            "swapped": scheduler.swapped.total(),
            "blocks_out": swap.num_out if swap else 0,
            "blocks_in": swap.num_in if swap else 0,
        }


def table(load: Load, rows: dict[str, dict[str, float]], *, is_same: bool) -> Table:
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

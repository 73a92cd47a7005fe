"""Iterations of one engine against what the machine can do, and what the project promises.

    python benchmarks/engine.py                        # the demo model, some two minutes
    python benchmarks/engine.py --model MODEL --dtype float32

Runs every case a few times in each of several rounds, in turn, so that whatever else the machine
does meets all of them alike. An iteration is what the executor does with a batch: preparing its
input, the model, and sampling. Prints tables, and writes all times to
benchmarks/results/engine.json and a picture to docs/engine.png. Promises are judged by the least
times and the best rates of the run; the same ratios of the medians are beside them.
"""

from __future__ import annotations

import stallfree  # noqa: F401  # before torch: it says how long idle threads spin

# isort: split
import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from engine_loop import KV_TOKENS, measure_loop
from engine_picture import draw
from engine_promises import BATCHES, CASES, ONE, Promise, promises_of_engine, promises_of_steps
from engine_start import measure_starts
from rich import box
from rich.console import Console
from rich.table import Table
from server import machine_facts
from steps import Bounds, Case, Costs, Steps

from stallfree import LLM
from stallfree.engine.settings import DTYPES
from stallfree.errors import StallfreeError
from stallfree.kernels.int8_matmul import padded
from stallfree.kernels.ir import LANES
from stallfree.model.config import ModelConfig
from stallfree.model.source import open_model

ROOT = Path(__file__).parent.parent
LARGEST = BATCHES[-1]
START_KV_BYTES = 1 << 30  # of the processes that are started
TABLE_WIDTH = 110  # also where the output is no terminal


def main() -> int:
    """Run the benchmark; 1 if something could not be measured."""
    options = _options()
    rounds, num_warm = (1, 1) if options.quick else (options.rounds, 3)
    settings = {"model": options.model, "dtype": options.dtype, "threads": options.threads}
    try:
        engine = LLM(**settings, kv_cache_memory_bytes=loop_kv_bytes(options.model)).engine
        executor: Any = engine.executor
        decoder = executor.decoder
        weight_size = 1 if engine.facts.dtype == "int8" else decoder.dtype.itemsize
        costs = Costs(decoder.config, weight_size, decoder.kv_bytes_per_token)
        bounds = Bounds(engine.facts.dtype)
        times, outside = measure(Steps(decoder, CASES), rounds, bounds)
        print("the loop", file=sys.stderr)
        loop = measure_loop(engine)
        print(f"{1 + num_warm} starts", file=sys.stderr)
        start = measure_starts({**settings, "kv_cache_memory_bytes": START_KV_BYTES}, num_warm)
    except (StallfreeError, subprocess.CalledProcessError) as error:
        print(f"the engine cannot be measured: {error}", file=sys.stderr)
        return 1
    least = {case: min(some) for case, some in times.items()}
    medians = {case: statistics.median(some) for case, some in times.items()}
    promises = [
        *promises_of_steps(least, medians, costs, bounds),
        *promises_of_engine(loop, start),
    ]
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": {**machine_facts(), **bounds.facts},
        "model": engine.facts.model_name,
        "dtype": engine.facts.dtype,
        "threads": engine.facts.threads,
        "rounds": rounds,
        "cases": [_record(case, times[case], costs, bounds) for case in CASES],
        "share_outside_model": statistics.median(outside[LARGEST]),
        "loop": loop,
        "start": start,
        "promises": [
            {
                "name": p.name,
                "value": p.value,
                "of_medians": p.of_medians,
                "limit": p.limit_text,
                "is_met": p.is_met,
            }
            for p in promises
        ],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw(result, options.picture)
    print(f"wrote {options.json} and {options.picture}", file=sys.stderr)
    console = Console(width=TABLE_WIDTH)
    console.print(
        f"{result['model']} in {result['dtype']}, {result['threads']} threads of "
        f"{result['machine']['cpu']}: {bounds}"
    )
    console.print(case_table(result["cases"], bounds.reference))
    console.print(
        f"share_outside_model: {result['share_outside_model']:.1%} of {LARGEST.name}, "
        "for input and sampling"
    )
    console.print(promise_table(promises))
    return 0


def loop_kv_bytes(model: str | None) -> int:
    """Of a KV cache that is large enough for the loop, whatever its type.

    Raises:
        ConfigError, ModelError: the model cannot be used.
    """
    config = ModelConfig.from_hf(open_model(model).hf_config)
    width = 2 * padded(config.head_dim, LANES)
    float32_size = 4
    return KV_TOKENS * config.num_layers * config.num_kv_heads * width * float32_size


def measure(
    steps: Steps, rounds: int, bounds: Bounds
) -> tuple[dict[Case, list[float]], dict[Case, list[float]]]:
    """Run all cases, and measure the bounds between them.

    Returns:
        Of all runs of each case, the seconds, and the share of them outside the model.
    """
    times: dict[Case, list[float]] = {case: [] for case in CASES}
    shares: dict[Case, list[float]] = {case: [] for case in CASES}
    for case in CASES:
        steps.run(case)  # the first makes room for its rows
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        bounds.measure()
        for case in CASES:
            for _ in range(case.repeats):
                time_s, outside_s = steps.run(case)
                times[case].append(time_s)
                shares[case].append(outside_s / time_s)
    return times, shares


def _record(case: Case, times_s: list[float], costs: Costs, bounds: Bounds) -> dict[str, Any]:
    num_bytes, operations = costs.bytes(case), costs.operations(case)
    return {
        "name": case.name,
        "batch": len(case.requests) if case in (ONE, *BATCHES) else None,
        "min_ms": min(times_s) * 1000,
        "median_ms": statistics.median(times_s) * 1000,
        "floor_ms": bounds.floor_s(num_bytes, operations) * 1000,
        "bytes": num_bytes,
        "operations": operations,
        "times_ms": [time_s * 1000 for time_s in times_s],
    }


def case_table(records: list[dict[str, Any]], reference: str) -> Table:
    """Times of the cases beside their floors."""
    caption = (
        "floor: weights and KV at the read bandwidth, or all operations at the rate of\n"
        f"{reference}, whichever takes longer; x: least time / floor. {reference} is a\n"
        "reference, no limit of the machine: x can be less than 1"
    )
    made = Table("tokens at context", caption=caption, box=box.SIMPLE)
    for title in ("least ms", "median ms", "floor ms", "x floor"):
        made.add_column(title, justify="right", no_wrap=True)
    for each in records:
        numbers = [each[name] for name in ("min_ms", "median_ms", "floor_ms")]
        ratio = each["min_ms"] / each["floor_ms"]
        made.add_row(each["name"], *(f"{number:,.1f}" for number in numbers), f"{ratio:.2f}")
    return made


def promise_table(promises: list[Promise]) -> Table:
    """What is promised and whether it is kept, by the least times."""
    made = Table("promise", box=box.SIMPLE)
    for title in ("measured", "medians", "limit", "met"):
        made.add_column(title, justify="right", no_wrap=True)
    for each in promises:
        met = "yes" if each.is_met else "NO"
        medians = "" if each.of_medians is None else each.form.format(each.of_medians)
        made.add_row(each.name, each.form.format(each.value), medians, each.limit_text, met)
    return made


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder, GGUF or hub id; the demo model if left out")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--threads", type=int, help="all CPUs if left out")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="one round: numbers mean little")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/engine.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/engine.png")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())

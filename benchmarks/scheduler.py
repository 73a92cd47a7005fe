"""The scheduler's own time for an iteration: 256 running requests, 1,000 waiting ones.

    python benchmarks/scheduler.py

Nothing else runs: the iteration's result is made up. Prints a table, and writes it to
benchmarks/results/scheduler.json. The aim is a median below 1 ms.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from server import machine_facts

from stallfree.core.blocks import BlockPool
from stallfree.core.budget import SloBudget, StaticBudget, TokenBudget
from stallfree.core.request import Request
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler, SchedulerConfig
from stallfree.core.step_time import BatchShape, StepTimeModel, StepTimePredictor
from stallfree.core.targets import Targets

ROOT = Path(__file__).parent.parent
RUNNING, WAITING, WARM_UP = 256, 1000, 50
CASES: dict[str, dict[str, Any]] = {
    "static budget": {"slo": False},
    "--tbt-slo": {},
    "--tbt-slo, edf": {"prefill_order": "edf"},
    "--tbt-slo, srpf": {"prefill_order": "srpf"},
    "--tbt-slo, edf, three tiers, fair": {"prefill_order": "edf", "is_fair": True, "mixed": True},
}
# A device that is so fast that 256 decodes and a long chunk fit in the target.
TIMES = StepTimeModel(0.005, (1, 2048), (0.2,), 1e-9, 1e-8, 1e-6, (0.97, 0.99, 1.0, 1.02, 1.05))


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/scheduler.json")
    options = parser.parse_args()
    if options.iterations < 1:
        parser.error(f"--iterations is {options.iterations}; at least 1")
    rows: list[dict[str, Any]] = [
        {"case": name, **measure(options.iterations, **case)} for name, case in CASES.items()
    ]
    result = {"machine": machine_facts(), "running": RUNNING, "waiting": WAITING, "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    title = f"one iteration of the scheduler, {RUNNING} running and {WAITING:,} waiting requests"
    table = Table("setting", title=title, title_justify="left", box=box.SIMPLE)
    for column in ("median ms", "p99 ms", "tokens"):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = (f"{row[name]:.3f}" for name in ("median_ms", "p99_ms"))
        table.add_row(row["case"], *numbers, f"{row['tokens']:.0f}")
    Console(width=100).print(table)
    return 0


def measure(
    iterations: int,
    *,
    slo: bool = True,
    prefill_order: str = "fcfs",
    is_fair: bool = False,
    mixed: bool = False,
) -> dict[str, float]:
    """Time so many iterations; whoever ends is replaced, so that the numbers stay the same.

    Returns:
        median_ms and p99_ms of schedule, complete and observe together, and tokens, the mean of a
        batch.
    """
    rng = random.Random(0)
    budget: TokenBudget = StaticBudget(512, 8)
    if slo:
        budget = SloBudget(0.1, StepTimePredictor(TIMES), tile_tokens=8)
    config = SchedulerConfig("sarathi", RUNNING, 8192, prefill_order=prefill_order, is_fair=is_fair)
    scheduler = Scheduler(config, BlockPool(100_000, 16), budget)
    times: list[float] = []
    tokens: list[int] = []
    number, now = 0, 0.0
    while len(times) < WARM_UP + iterations:
        while len(scheduler.waiting) < WAITING:
            number += 1
            scheduler.add(_request(number, now, rng, mixed))
        is_full = len(scheduler.running) >= RUNNING - 8
        started = time.perf_counter()
        batch = scheduler.schedule(now)
        assert batch is not None
        scheduled = time.perf_counter()
        sampled = [1] * len(batch.sampling)
        seconds = TIMES.seconds(BatchShape.of(batch))
        resumed = time.perf_counter()
        scheduler.complete(batch, sampled)
        budget.observe(batch, seconds)
        if is_full:
            times.append(scheduled - started + time.perf_counter() - resumed)
            tokens.append(batch.num_tokens)
        now += seconds
    times, tokens = times[WARM_UP:], tokens[WARM_UP:]
    return {
        "median_ms": statistics.median(times) * 1000,
        "p99_ms": sorted(times)[int(0.99 * len(times))] * 1000,
        "tokens": statistics.mean(tokens),
    }


def _request(number: int, now: float, rng: random.Random, mixed: bool) -> Request:
    targets = Targets()
    if mixed:
        tier = rng.choice(["priority", "default", "default", "flex"])
        targets = Targets(tier, ttft_s=rng.choice([1.0, 5.0]), user=f"user{rng.randrange(50)}")
    params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    return Request(
        str(number),
        [1] * rng.randrange(20, 400),
        params,
        max_tokens=rng.randrange(300, 500),
        arrived_at=now,
        targets=targets,
    )


if __name__ == "__main__":
    sys.exit(main())

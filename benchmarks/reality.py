"""Does the simulator tell the truth? A run on this machine beside its simulation.

    python benchmarks/reality.py --qps 0.8       # three schedulers, some 15 minutes

For each scheduler 200 requests are sent at random times to a new server, which notes its
iterations. The same requests are simulated, as the server counted and the client sent them, with
three kinds of step times:

- profile: `stallfree profile`, measured before, where nothing but the model runs;
- others: fitted to the iterations of the two other live runs, so that they hold what serving costs
  (the client and the HTTP work share the processor with the model) and nothing of the run itself;
- speed: the same times one number, how long this run's iterations took in all over what the
  others' fit predicts for them: the speed of a shared machine drifts between runs.

Prints them beside the live run; results go to benchmarks/results/reality.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from server import ServerError, machine_facts, serving

from stallfree.bench.files import read_json
from stallfree.bench.metrics import Summary, summarize
from stallfree.bench.records import Results
from stallfree.bench.workload import Workload
from stallfree.core.step_time import BatchShape, StepTimeModel, fit
from stallfree.engine.profile import read_profile
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.sim.measured import read_iterations
from stallfree.sim.router import LeastWork
from stallfree.sim.simulation import simulate
from stallfree.sim.system import System
from stallfree.sim.times import ProfiledTimes

ROOT = Path(__file__).parent.parent
CONTEXT, LONGEST, KV_BYTES = 640, 600, 2**31
LIMIT = 0.15
DRAWS = 5  # of the scatter of iterations; the mean of so many simulations is compared
SCHEDULERS = {
    "sarathi": SchedulingSettings(scheduler="sarathi", token_budget=96, max_model_len=CONTEXT),
    "vllm": SchedulingSettings(scheduler="vllm", max_model_len=CONTEXT),
    "orca": SchedulingSettings(scheduler="orca", max_model_len=CONTEXT),
}
NUMBERS = ("TBT P50", "TBT P99", "TTFT P50", "TTFT P99", "tokens/s")
KINDS = ("profile", "others", "speed")


@dataclass(frozen=True, slots=True)
class LiveRun:
    """What a server did.

    Attributes:
        results: as the client saw it.
        iterations: what each held, and its seconds.
    """

    results: Results
    iterations: Sequence[tuple[BatchShape, float]]


def main() -> int:
    """Run and simulate all; 1 if a server failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--qps", type=float, required=True, help="70 %% of the capacity")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/reality.json")
    options = parser.parse_args()
    live: dict[str, LiveRun] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "profile.json"
        try:
            _stallfree("profile", "--output", str(path), "--rounds", "2", *_memory())
            for name in SCHEDULERS:
                live[name] = _live_run(name, options, Path(folder))
        except (ServerError, subprocess.CalledProcessError) as error:
            print(error, file=sys.stderr)
            return 1
        profile = read_profile(path)
        kv_bytes = json.loads(path.read_text(encoding="utf-8"))["identity"]["kv_bytes_per_token"]
    kv_tokens = KV_BYTES // kv_bytes
    runs = {
        name: compare(live, name, profile.times, kv_tokens, profile.tile_tokens) for name in live
    }
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_facts(),
        "runs": runs,
    }
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    Console().print(table(runs))
    return 0


def _live_run(name: str, options: argparse.Namespace, folder: Path) -> LiveRun:
    scheduling = SCHEDULERS[name]
    iterations, output = folder / f"{name}.csv", folder / f"{name}.json"
    arguments = ["--scheduler", name, "--max-model-len", str(CONTEXT), *_memory()]
    if scheduling.token_budget is not None:
        arguments += ["--token-budget", str(scheduling.token_budget)]
    with serving([*arguments, "--iteration-file", str(iterations)]) as url:
        load = ["--qps", str(options.qps), "--num-requests", str(options.requests)]
        load += ["--max-total-tokens", str(LONGEST), "--output", str(output)]
        _stallfree("bench", "serve", url, *load)
    return LiveRun(read_json(output), read_iterations(iterations))


def _memory() -> list[str]:
    return ["--kv-cache-memory", str(KV_BYTES)]


def _stallfree(*arguments: str) -> None:
    print("stallfree", *arguments, file=sys.stderr)
    command = [sys.executable, "-m", "stallfree.cli", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def compare(
    live: dict[str, LiveRun], name: str, profile: StepTimeModel, kv_tokens: int, tile_tokens: int
) -> dict[str, Any]:
    """A live run, its simulations, and the speeds of the machine that they differ in."""
    own = live[name]
    others = fit([each for other in live if other != name for each in live[other].iterations])
    speed = slowdown(others, own.iterations)
    times = {"profile": profile, "others": others, "speed": slower(others, speed)}
    compared: dict[str, Any] = {"live": numbers(summarize(own.results))}
    for kind, model in times.items():
        system = System(
            partial(ProfiledTimes, model),
            SCHEDULERS[name],
            kv_tokens,
            CONTEXT,
            tile_tokens=tile_tokens,
        )
        compared[kind] = _simulated(as_sent(own.results), system)
    return compared | {
        "slower than the profile": slowdown(profile, own.iterations),
        "slower than the others": speed,
    }


def slowdown(times: StepTimeModel, iterations: Sequence[tuple[BatchShape, float]]) -> float:
    """How long iterations took, together, over what was predicted."""
    taken = sum(seconds for _, seconds in iterations)
    return taken / sum(times.seconds(shape) for shape, _ in iterations)


def slower(times: StepTimeModel, factor: float) -> StepTimeModel:
    """The same times on a machine that takes `factor` as long."""
    return times.with_costs([cost * factor for cost in times.costs])


def as_sent(live: Results) -> Workload:
    """The same requests, as the server counted and the client sent them."""
    arrivals = tuple(
        replace(
            record.arrival,
            at_s=record.sent_s,
            prompt_tokens=record.prompt_tokens or record.arrival.prompt_tokens,
            output_tokens=record.output_tokens or record.arrival.output_tokens,
        )
        for record in sorted(live.records, key=lambda each: each.sent_s)
    )
    return replace(live.workload, arrivals=arrivals)


def _simulated(workload: Workload, system: System) -> dict[str, float]:
    """The mean over several draws of the scatter."""
    runs = [
        numbers(summarize(simulate(workload, [system.replica(seed)], LeastWork()).results))
        for seed in range(DRAWS)
    ]
    return {key: mean(run[key] for run in runs) for key in NUMBERS}


def numbers(summary: Summary) -> dict[str, float]:
    """What is compared: times in ms."""
    own = summary.latencies
    return {
        "TBT P50": own["tbt"]["p50"] * 1000,
        "TBT P99": own["tbt"]["p99"] * 1000,
        "TTFT P50": own["ttft"]["p50"] * 1000,
        "TTFT P99": own["ttft"]["p99"] * 1000,
        "tokens/s": summary.total_tokens_per_s,
    }


def table(runs: dict[str, Any]) -> Table:
    """The live runs, and what each kind of simulation gives of them."""
    made = Table(title="live, and simulated / live", title_justify="left", box=box.SIMPLE)
    made.add_column("scheduler")
    for number in NUMBERS:
        made.add_column(number, justify="right")
    for name, run in runs.items():
        made.add_row(f"{name}, live", *(f"{run['live'][key]:,.0f}" for key in NUMBERS))
        for kind in KINDS:
            ratios = {key: run[kind][key] / run["live"][key] for key in NUMBERS}
            marks = (f"{r:.2f}{'' if abs(r - 1) <= LIMIT else ' !'}" for r in ratios.values())
            made.add_row(f"{name}, {kind}", *marks)
    return made


if __name__ == "__main__":
    sys.exit(main())

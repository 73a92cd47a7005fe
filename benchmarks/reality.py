"""Does the simulator tell the truth? A run on this machine beside its simulation.

    python benchmarks/reality.py --qps 0.8       # three schedulers, some 20 minutes

For each scheduler 200 requests are sent at random times to a new server. Step times are profiled
before and after, as the speed of a machine drifts; the same requests are simulated with each of the
two profiles, and the mean of both is what is compared. Prints it beside the live run; results go to
benchmarks/results/reality.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
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
from stallfree.cli.system_options import SystemSettings
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.sim.router import LeastWork
from stallfree.sim.simulation import simulate

ROOT = Path(__file__).parent.parent
CONTEXT, LONGEST, KV_BYTES = 640, 600, 2**31
LIMIT = 0.15
SCHEDULERS = {
    "sarathi": SchedulingSettings(scheduler="sarathi", token_budget=96, max_model_len=CONTEXT),
    "vllm": SchedulingSettings(scheduler="vllm", max_model_len=CONTEXT),
    "orca": SchedulingSettings(scheduler="orca", max_model_len=CONTEXT),
}
NUMBERS = ("TBT P50", "TBT P99", "TTFT P50", "TTFT P99", "tokens/s")


def main() -> int:
    """Run and simulate all; 1 if a server failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--qps", type=float, required=True, help="70 %% of the capacity")
    parser.add_argument("--only", nargs="*", choices=SCHEDULERS)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/reality.json")
    options = parser.parse_args()
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before.json"
        try:
            _profile(before)
            for name in options.only or SCHEDULERS:
                after = Path(folder) / f"after-{name}.json"
                runs[name] = _compare(name, options, before, after)
                before = after
        except (ServerError, subprocess.CalledProcessError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_facts(),
        "runs": runs,
    }
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    Console().print(table(runs))
    return 0


def _compare(name: str, options: argparse.Namespace, before: Path, after: Path) -> dict[str, Any]:
    """Run and simulate one scheduler; the profile from before is there, the one after is made."""
    scheduling = SCHEDULERS[name]
    budget = ["--token-budget", str(scheduling.token_budget)] if scheduling.token_budget else []
    arguments = ["--scheduler", name, *budget]
    arguments += ["--max-model-len", str(CONTEXT), "--kv-cache-memory", "2GiB"]
    output = after.with_name(f"{name}.json")
    with serving(arguments) as url:
        load = ["--qps", str(options.qps), "--num-requests", str(options.requests)]
        load += ["--max-total-tokens", str(LONGEST), "--output", str(output)]
        _stallfree("bench", "serve", url, *load)
    _profile(after)
    live = read_json(output)
    simulated = [_simulated(live, path, scheduling) for path in (before, after)]
    return {
        "live": numbers(summarize(live)),
        "simulated": {key: mean(numbers(each)[key] for each in simulated) for key in NUMBERS},
        "before": numbers(simulated[0]),
        "after": numbers(simulated[1]),
    }


def _profile(path: Path) -> None:
    _stallfree("profile", "--output", str(path), "--rounds", "2", "--kv-cache-memory", "2GiB")


def _stallfree(*arguments: str) -> None:
    print("stallfree", *arguments, file=sys.stderr)
    command = [sys.executable, "-m", "stallfree.cli", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _simulated(live: Results, profile: Path, scheduling: SchedulingSettings) -> Summary:
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
    workload = replace(live.workload, arrivals=arrivals)
    measured_on = json.loads(profile.read_text(encoding="utf-8"))["identity"]
    kv_tokens = KV_BYTES // measured_on["kv_bytes_per_token"]
    system = SystemSettings(profile=profile, kv_cache_tokens=kv_tokens)
    replica = system.system(scheduling).replica()
    return summarize(simulate(workload, [replica], LeastWork()).results)


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
    """Live and simulated, and their ratio."""
    made = Table(title="live and simulated", title_justify="left", box=box.SIMPLE)
    made.add_column("scheduler")
    for number in NUMBERS:
        made.add_column(number, justify="right")
    for name, run in runs.items():
        for kind in ("live", "simulated"):
            made.add_row(f"{name}, {kind}", *(f"{run[kind][key]:,.0f}" for key in NUMBERS))
        ratios = {key: run["simulated"][key] / run["live"][key] for key in NUMBERS}
        marks = (f"{r:.2f}{'' if abs(r - 1) <= LIMIT else ' !'}" for r in ratios.values())
        made.add_row("ratio", *marks)
    return made


if __name__ == "__main__":
    sys.exit(main())

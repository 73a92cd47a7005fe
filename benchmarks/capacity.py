"""Capacity of each scheduler, live: the highest rate that keeps a target, on this machine.

    python benchmarks/capacity.py               # five settings, two targets: some 40 minutes
    python benchmarks/capacity.py --resume      # go on where an earlier run was interrupted

The targets are 5 and 25 times a decode iteration of eight answers (40 ms here), as the paper sets
them for its devices. Requests have the lengths of openchat_sharegpt4, scaled to 600 tokens, and
arrive at random for at least a minute, 30 of them at least. The search is that of `stallfree bench
capacity`, one seed to 10 %, from rates near what was found before. Prints a table; results go to
benchmarks/results/capacity.json.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from server import ServerError, machine_facts, serving

from stallfree.bench.capacity import Criterion
from stallfree.bench.capacity_report import capacity_json, probe_line
from stallfree.bench.capacity_search import SearchSettings, find_capacities
from stallfree.bench.endpoint import Endpoint
from stallfree.bench.probe_file import ProbeFile
from stallfree.cli.live_system import LiveSystem
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.errors import EndpointError

ROOT = Path(__file__).parent.parent
STATE = Path(tempfile.gettempdir()) / "stallfree-capacity.jsonl"
CONTEXT, LONGEST = 640, 600
TARGETS_S = {"strict": 0.2, "relaxed": 1.0}
COMMON = f"--max-model-len {CONTEXT} --kv-cache-memory 2GiB"
FIRST_STEP = 1.2  # of the search, from a guess that is a good one
SETTINGS = {  # by name and target: the arguments of the server, and a guess of the capacity
    "sarathi --tbt-slo": {"strict": ("--tbt-slo 0.2s", 1.2), "relaxed": ("--tbt-slo 1.0s", 1.2)},
    "sarathi": {"strict": ("--token-budget 48", 1.1), "relaxed": ("--token-budget 256", 1.2)},
    "vllm": {"strict": ("--scheduler vllm", 0.3), "relaxed": ("--scheduler vllm", 0.8)},
    "orca": {"strict": ("--scheduler orca", 0.27), "relaxed": ("--scheduler orca", 0.6)},
    "faster_transformer": {
        "strict": ("--scheduler faster_transformer", 0.4),
        "relaxed": ("--scheduler faster_transformer", 0.4),
    },
}


def main() -> int:
    """Search all capacities; 1 if a server failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=30, help="of each run at least")
    parser.add_argument("--duration", type=float, default=60.0, help="least, of arrivals, in s")
    parser.add_argument("--precision", type=float, default=0.1)
    parser.add_argument("--min-qps", type=float, default=0.05, help="the lowest rate that is tried")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, help="some of the settings")
    parser.add_argument("--resume", action="store_true", help="take known runs from the last time")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/capacity.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if not options.resume:
        STATE.unlink(missing_ok=True)
    found: dict[str, dict[str, Any]] = {}
    try:
        for name in options.only or SETTINGS:
            found[name] = _capacities(name, options)
    except (ServerError, EndpointError) as error:
        print(f"the server does not answer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; go on with --resume", file=sys.stderr)
        return 130
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine_facts(),
        "targets_s": TARGETS_S,
        "requests": options.requests,
        "precision": options.precision,
        "note": "",  # for people: what of it is not of this run
        "capacities": found,
    }
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    Console().print(table(found))
    return 0


def _capacities(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The capacity under each target, with all runs behind it."""
    found: dict[str, Any] = {}
    for target, (arguments, guess_qps) in SETTINGS[name].items():
        print(f"{name}, {target}: {arguments}", file=sys.stderr)
        with serving([*COMMON.split(), *arguments.split()]) as url:
            found[target] = _search(
                url, arguments, Criterion(TARGETS_S[target]), guess_qps, options
            )
    return found


def _search(
    url: str, arguments: str, criterion: Criterion, guess_qps: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One capacity and its runs; those for another target of the same arguments are known."""
    settings = WorkloadSettings(num_requests=options.requests, max_total_tokens=LONGEST)
    system = LiveSystem(Endpoint(url), settings, options.duration)
    facts = {**system.facts(), "endpoint": arguments}  # the port is another one each time
    prefill = system.measure_unloaded()
    search = SearchSettings(
        seeds=(0,),
        start_qps=guess_qps,
        min_qps=options.min_qps,
        precision=options.precision,
        first_step=FIRST_STEP,
    )
    found = find_capacities(
        system.measure,
        [criterion],
        search,
        ProbeFile(STATE, facts),
        prefill,
        on_probe=lambda probe: print(" ", probe_line(probe, [criterion]), file=sys.stderr),
    )
    written = capacity_json(found, facts)
    return {**written["capacities"][0], "arguments": arguments, "probes": written["probes"]}


def table(found: dict[str, dict[str, Any]]) -> Table:
    """Requests per second under each target."""
    made = Table(title="capacity, requests per second", title_justify="left", box=box.SIMPLE)
    made.add_column("scheduler")
    for name, seconds in TARGETS_S.items():
        made.add_column(f"{name}, {seconds * 1000:,.0f} ms", justify="right")
    for name, own in found.items():
        made.add_row(name, *(_cell(own[target]) for target in TARGETS_S))
    return made


def _cell(own: dict[str, Any]) -> str:
    (seed,) = own["seeds"]
    if seed["qps"] is None:
        return f"below {seed['failed_qps']:.2g}"
    if seed["failed_qps"] is None:
        return f"at least {seed['qps']:.2g}"
    return f"{seed['qps']:.2f}"


if __name__ == "__main__":
    sys.exit(main())

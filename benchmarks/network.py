"""Tensor against pipeline parallelism over a slow network, as section 5.3 of the paper compares.

    python benchmarks/network.py        # as root on Linux, some six minutes; let nothing else run

Two "hosts" on this machine: network namespaces, joined by a pair of virtual interfaces whose
bandwidth is limited with tbf. The demo model in float32 has one process of one thread on each,
either sharing every layer or with half of the layers; eight requests are in it at any time. Then
the network is cut while answers come: how long until that is reported, and what is said. Prints
tables; results go to benchmarks/results/network.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from live_load import Load
from rich import box
from rich.console import Console
from rich.table import Table
from server import machine_facts

from stallfree.engine.build import build_engine
from stallfree.engine.settings import EngineSettings
from stallfree.errors import WorkersLostError
from stallfree.executor.launch import LocalProcess
from stallfree.executor.messages import WorkerSpec

ROOT = Path(__file__).parent.parent
HOSTS = ("stallfree-a", "stallfree-b")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "veth0"
MEGABITS = (None, 1000, 100)
MODES = {"TP 2": {"tensor_parallel_size": 2}, "PP 2": {"pipeline_parallel_size": 2}}
TIMEOUT_S = 15.0


class TwoHosts:
    """Starts the second process on the other host."""

    host = ADDRESSES[0]

    def start(self, spec: WorkerSpec) -> LocalProcess:
        """See `Launcher`."""
        prefix = ["ip", "netns", "exec", HOSTS[1]] if spec.rank else []
        return LocalProcess(spec, prefix)

    def close(self) -> None:
        """Nothing was reserved."""


def run_inside() -> int:
    """Lay the network, run this program on its first host with --inside, and take it away.

    Returns:
        The exit code; 1 without the right to lay one.
    """
    if os.geteuid() != 0:
        print("network namespaces can only be made as root", file=sys.stderr)
        return 1
    with network():
        command = [sys.executable, *sys.argv, "--inside"]
        return subprocess.call(["ip", "netns", "exec", HOSTS[0], *command])


def main() -> int:
    """Run all on a network that is laid for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20, help="of each run")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/network.json")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        return run_inside()
    os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    runs = {name: run(sizes, options.seconds) for name, sizes in MODES.items()}
    result = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["python", *sys.argv]).removesuffix(" --inside"),
        "machine": machine_facts(),
        "runs": runs,
    }
    options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    console = Console()
    console.print(table(runs))
    for name, own in runs.items():
        cut = own["cut"]
        console.print(
            f"{name}, cut off: reported after {cut['reported_s']:.1f} s: {cut['message']}"
        )
    return 0


def run(sizes: dict[str, int], seconds: float) -> dict[str, Any]:
    """One way to split the model, at every bandwidth; then the cut."""
    print(f"{sizes}", file=sys.stderr)
    limit(None)
    settings = EngineSettings(
        dtype="float32",
        threads=1,
        max_num_seqs=8,
        max_model_len=1024,
        kv_cache_memory_bytes=2**30,
        worker_timeout_s=TIMEOUT_S,
        **sizes,  # type: ignore[arg-type]
    )
    engine = build_engine(settings, launcher=TwoHosts())
    load = Load(engine, (32, 64, 256), (64,), 8)
    own: dict[str, Any] = {}
    for megabits in MEGABITS:
        limit(megabits)
        load.run(seconds / 4)
        load.forget()
        load.run(seconds)
        own[str(megabits)] = {
            "tbt_p50_s": load.percentile(0.5),
            "tbt_p99_s": load.percentile(0.99),
            "tokens_per_s": load.num_tokens / seconds,
        }
    own["cut"] = cut(load)
    engine.close()
    return own


def cut(load: Load) -> dict[str, Any]:
    """Cut the network while answers come."""
    limit(None)
    load.run(2)
    ip("-n", HOSTS[1], "link", "set", INTERFACE, "down")
    started = time.monotonic()
    try:
        load.run(60)
    except WorkersLostError as error:
        return {"reported_s": time.monotonic() - started, "message": str(error).splitlines()[0]}
    finally:
        ip("-n", HOSTS[1], "link", "set", INTERFACE, "up")
    return {"reported_s": float("nan"), "message": "nothing was reported"}


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Two namespaces and a cable between them."""
    try:
        for host in HOSTS:
            ip("netns", "add", host)
        ends = [f"stallfree{index}" for index in range(2)]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, end, address in zip(HOSTS, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", host, "name", INTERFACE)
            ip("-n", host, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                ip("-n", host, "link", "set", interface, "up")
        yield
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], check=False)


def limit(megabits: int | None) -> None:
    """Limit what each end sends; None for no limit."""
    for host in HOSTS:
        command = ["tc", "-n", host, "qdisc", "del", "dev", INTERFACE, "root"]
        subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
        if megabits is not None:
            shape = ["rate", f"{megabits}mbit", "burst", "64kb", "latency", "200ms"]
            command = ["tc", "-n", host, "qdisc", "add", "dev", INTERFACE, "root", "tbf", *shape]
            subprocess.run(command, check=True)


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True)


def table(runs: dict[str, Any]) -> Table:
    """Time between tokens and throughput, by bandwidth and split."""
    made = Table(title="two hosts, eight requests", title_justify="left", box=box.SIMPLE)
    made.add_column("bandwidth")
    for name in runs:
        for number in ("TBT P50", "TBT P99", "tokens/s"):
            made.add_column(f"{name}: {number}", justify="right")
    for megabits in MEGABITS:
        cells = ["no limit" if megabits is None else f"{megabits:,} Mbit/s"]
        for own in runs.values():
            numbers = own[str(megabits)]
            cells += [f"{numbers[key] * 1000:,.0f} ms" for key in ("tbt_p50_s", "tbt_p99_s")]
            cells.append(f"{numbers['tokens_per_s']:,.0f}")
        made.add_row(*cells)
    return made


if __name__ == "__main__":
    sys.exit(main())

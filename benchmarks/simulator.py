"""How fast the simulator is: iterations a second of one replica, at three loads.

    python benchmarks/simulator.py

Step times are made up: 20 ms and 0.2 ms a token, so that some 2 requests a second saturate it.
"""

from __future__ import annotations

import sys
import time

from rich import box
from rich.console import Console
from rich.table import Table

from stallfree.bench.workloads import Recipe
from stallfree.core.step_time import StepTimeModel
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.sim.router import LeastWork
from stallfree.sim.simulation import simulate
from stallfree.sim.system import System
from stallfree.sim.times import ProfiledTimes

TIMES = StepTimeModel(0.02, (1, 512), (0.1,), 1e-8, 1e-7, 1e-5)
LOADS = (0.2, 0.5, 2.0)
NUM_REQUESTS = 500


def main() -> int:
    """Run each load once."""
    system = System(lambda _: ProfiledTimes(TIMES), SchedulingSettings(), 320_000, 8192)
    table = Table(title=f"{NUM_REQUESTS} requests of openchat_sharegpt4", box=box.SIMPLE)
    for title in ("requests/s", "iterations", "tokens in each", "iterations a second"):
        table.add_column(title, justify="right")
    for qps in LOADS:
        workload = Recipe("openchat_sharegpt4", "poisson", NUM_REQUESTS, qps).make()
        replica = system.replica()
        started = time.perf_counter()
        simulate(workload, [replica], LeastWork())
        seconds = time.perf_counter() - started
        tokens = sum(each.prompt_tokens + each.output_tokens for each in workload.arrivals)
        count = replica.num_iterations
        row = (f"{qps:g}", f"{count:,}", f"{tokens / count:,.1f}", f"{count / seconds:,.0f}")
        table.add_row(*row)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())

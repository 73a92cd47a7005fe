"""`stallfree plan`: how many devices a workload needs to be served within its targets."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import typer

from stallfree.cli.endpoint_options import SloSettings
from stallfree.cli.simulate import RouterOption
from stallfree.cli.system_options import SystemSettings
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.engine.scheduling_settings import SchedulingSettings
from stallfree.errors import ConfigError

if TYPE_CHECKING:
    from stallfree.sim.plan import Trial


def plan(
    system: SystemSettings,
    scheduling: SchedulingSettings,
    workload: WorkloadSettings,
    targets: SloSettings,
    router: RouterOption = "least-work",
    max_replicas: Annotated[
        int, typer.Option(min=1, max=4096, metavar="REPLICAS", help="Where to give up.")
    ] = 256,
) -> None:
    """Find the fewest replicas that serve a workload within its targets, by simulation.

    Each number is simulated with the whole workload: P99 of the time between all tokens must be
    within --slo-tbt, that of the time to the first token within --slo-ttft; without the latter, the
    median request must be begun with in 2 s. A number is given up once it cannot keep its targets
    any more. The exit code is 1 if not even --max-replicas are enough.

    Without --token-budget and --tbt-slo, an iteration holds 512 tokens on any device. Simulated
    requests have no users and no tiers, so --fair and --tier are refused.
    """
    from rich.console import Console

    from stallfree.sim.plan import find_replicas
    from stallfree.sim.router import make_router

    slo = targets.slo()
    if slo is None:
        raise ConfigError("a plan needs a target: give slo_tbt or slo_ttft")
    if workload.clients is not None:
        raise ConfigError("clients of a closed loop wait for any number of replicas; give qps")
    make_router(router)
    made = system.system(scheduling)
    arrivals = workload.workload(made.max_model_len)
    console = Console()
    console.print(arrivals.about, highlight=False, markup=False, soft_wrap=True)
    console.print("replicas  P99 TBT  P99 TTFT  tokens/s", highlight=False)

    def show(trial: Trial) -> None:
        console.print(_line(trial), highlight=False, markup=False, soft_wrap=True)

    found = find_replicas(arrivals, made, lambda: make_router(router), slo, max_replicas, show)
    if found is None:
        console.print(f"{max_replicas:,} replicas are not enough.", highlight=False)
        raise typer.Exit(1)
    devices = found * system.num_devices
    on = system.device or str(system.measured)
    what = f"{found:,} replica{'s' if found > 1 else ''}"
    line = f"{what}: {devices:,} x {on}"
    console.print(line, style="bold", highlight=False, markup=False, soft_wrap=True)


def _line(trial: Trial) -> str:
    own, tokens_per_s = trial.summary.latencies, trial.summary.output_tokens_per_s
    given_up = "" if trial.is_complete else ", given up"
    failed = [f", {count:,} {kind}" for kind, count in trial.summary.failures.items()]
    return (
        f"{trial.replicas:8,}  {_number(own['tbt']['p99'] * 1000, 5)} ms "
        f"{_number(own['ttft']['p99'], 7, 1)} s  {_number(tokens_per_s, 8)}  "
        f"{'within' if trial.keeps else 'not within'}{''.join(failed)}{given_up}"
    )


def _number(value: float, width: int, digits: int = 0) -> str:
    return f"{'-':>{width}}" if math.isnan(value) else f"{value:{width},.{digits}f}"

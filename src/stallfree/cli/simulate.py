"""`stallfree simulate`: the scheduler against a workload on hardware that is not here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallfree.cli.bench_serve import HtmlOption, check_outputs, print_report, write_results
from stallfree.cli.endpoint_options import SloSettings
from stallfree.cli.system_options import SystemSettings
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.engine.scheduling_settings import SchedulingSettings

if TYPE_CHECKING:
    from rich.table import Table

    from stallfree.sim.simulation import Simulation


def simulate(
    system: SystemSettings,
    scheduling: SchedulingSettings,
    workload: WorkloadSettings,
    targets: SloSettings,
    replicas: Annotated[
        int,
        typer.Option(
            min=1, max=4096, metavar="REPLICAS", help="Copies of the model behind a router."
        ),
    ] = 1,
    router: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="round-robin, least-work, or prefix-affine: where its prefix is."
        ),
    ] = "least-work",
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write everything, with the time of each token."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write a row for each request.")
    ] = None,
    html: HtmlOption = None,
) -> None:
    """Run a workload through the scheduler on simulated hardware, in a fraction of the time.

    It is the loop and the scheduler that serve; only the time of each iteration is predicted: from
    a device's operations and bytes, or from a profile of a real machine. Prints the report of
    `stallfree bench serve`, and what each pipeline stage did.
    """
    from rich.console import Console

    from stallfree.sim.router import make_router
    from stallfree.sim.simulation import simulate as run

    check_outputs(output, csv, html)
    made = system.system(scheduling)
    arrivals = workload.workload(made.max_model_len)
    facts = {**system.about, "scheduler": scheduling.scheduler, "replicas": replicas}
    copies = [made.replica(seed) for seed in range(replicas)]
    started = time.perf_counter()
    done = run(arrivals, copies, make_router(router), facts=facts)
    seconds = time.perf_counter() - started
    slo = targets.slo()
    console = Console()
    print_report(console, done.results, slo)
    console.print(_replicas(done))
    console.print(_speed(done, seconds), highlight=False)
    write_results(done.results, slo, output, csv, html)


def _replicas(done: Simulation) -> Table:
    """What each replica and its stages did."""
    from rich import box
    from rich.table import Table

    from stallfree.sim.pipeline import Bubble

    table = Table(box=box.SIMPLE)
    table.add_column("replica, stage")
    for title in ("iterations", "preemptions", "busy", *(kind.name for kind in Bubble)):
        table.add_column(title.replace("_", " ").lower(), justify="right")
    for number, replica in enumerate(done.replicas):
        for place, stage in enumerate(replica.pipeline.stages):
            total_s = done.results.end_s or 1.0
            shares = [stage.busy_s, *(stage.idle_s[kind] for kind in Bubble)]
            table.add_row(
                f"{number}, {place}",
                f"{replica.num_iterations:,}",
                f"{replica.num_preemptions:,}",
                *(f"{share / total_s:.1%}" for share in shares),
            )
    return table


def _speed(done: Simulation, seconds: float) -> str:
    iterations = sum(replica.num_iterations for replica in done.replicas)
    return (
        f"{done.results.end_s:,.1f} s simulated in {seconds:,.1f} s, {iterations:,} iterations: "
        f"{iterations / max(seconds, 1e-9):,.0f} a second"
    )

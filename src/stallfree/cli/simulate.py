"""`stallfree simulate`: the scheduler against a workload on hardware that is not here."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallfree.bench.probe_file import fingerprint
from stallfree.cli.bench_serve import HtmlOption, check_outputs, print_report, write_results
from stallfree.cli.endpoint_options import SloSettings
from stallfree.cli.system_options import SystemSettings
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.engine.flags import settings_of
from stallfree.engine.scheduling_settings import SchedulingSettings

if TYPE_CHECKING:
    from rich.console import Console

    from stallfree.sim.simulation import Simulation
    from stallfree.sim.system import System

ReplicasOption = Annotated[
    int,
    typer.Option(min=1, max=4096, metavar="REPLICAS", help="Copies of the model behind a router."),
]
RouterOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="round-robin, least-work, predicted-wait (the soonest first token, as serve "
        "--replicas has it), or prefix-affine: where the last request of its --prefixes went. "
        "Where simulated replicas keep none, it shows what affinity costs in balance, not what it "
        "saves.",
    ),
]


def simulate(
    system: SystemSettings,
    scheduling: SchedulingSettings,
    workload: WorkloadSettings,
    targets: SloSettings,
    replicas: ReplicasOption = 1,
    router: RouterOption = "least-work",
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--prefix-caching",
            help="Let each replica keep the KV of prompts, and not read again what --prefixes "
            "begin with. Without it all of a prompt is read.",
        ),
    ] = False,
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
    `stallfree bench serve`, and what each pipeline stage did. The exit code is 1 if any request
    failed.

    Without --token-budget and --tbt-slo, an iteration holds 512 tokens on any device. Simulated
    requests have no users and no tiers, so --fair and --tier are refused.
    """
    from rich.console import Console

    from stallfree.sim.router import make_router
    from stallfree.sim.simulation import simulate as run

    check_outputs(output, csv, html)
    made = replace(system.system(scheduling), prefix_caching=prefix_caching)
    arrivals = workload.workload(made.max_model_len)
    facts = _facts(system, scheduling, made) | {"replicas": replicas, "router": router}
    facts |= {"prefix_caching": True} if prefix_caching else {}
    copies = made.replicas(replicas, workload.workload_seed)
    started = time.perf_counter()
    done = run(arrivals, copies, make_router(router), facts=facts)
    seconds = time.perf_counter() - started
    slo = targets.slo()
    console = Console()
    print_report(console, done.results, slo)
    _print_replicas(console, done)
    if prefix_caching:
        console.print(_hits_line(done), highlight=False)
    num_iterations = sum(replica.num_iterations for replica in done.replicas)
    console.print(speed_line(done.results.end_s, seconds, num_iterations), highlight=False)
    write_results(done.results, slo, output, csv, html)
    if any(record.failure is not None for record in done.results.records):
        raise typer.Exit(1)


def _facts(
    system: SystemSettings, scheduling: SchedulingSettings, made: System
) -> dict[str, object]:
    """What a simulation depends on but its workload: settings that were changed, and a name.

    The name, of all settings of the system and what is in its files, is the same for the same.
    """
    changed = {
        setting.name: value
        for setting in settings_of(SchedulingSettings)
        if (value := getattr(scheduling, setting.field)) != setting.default
    }
    sizes = {"kv_cache_tokens": made.kv_cache_tokens, "max_model_len": made.max_model_len}
    named = {"system": fingerprint(system.facts())}
    return {**system.about, **sizes, **named, "scheduler": scheduling.scheduler, **changed}


def _print_replicas(console: Console, done: Simulation) -> None:
    """Print what each replica and its stages did."""
    from rich import box
    from rich.table import Table

    from stallfree.core.bubbles import Bubble

    is_split = any(replica.pipeline.num_stages > 1 for replica in done.replicas)
    kinds = list(Bubble) if is_split else [Bubble.NO_WORK]
    table = Table(box=box.SIMPLE, collapse_padding=True)  # nine columns in 80 characters
    titles = ["no work" if kind is Bubble.NO_WORK else kind.name for kind in kinds]
    for title in ("replica", "stage", "batches", "preempted", "busy", *titles):
        table.add_column(title, justify="right", no_wrap=True)
    for number, replica in enumerate(done.replicas):
        for place, stage in enumerate(replica.pipeline.stages):
            total_s = done.results.end_s or 1.0
            shares = [stage.busy_s, *(stage.idle_s[kind] for kind in kinds)]
            table.add_row(
                str(number),
                str(place),
                f"{replica.num_iterations:,}",
                f"{replica.num_preemptions:,}",
                *(f"{share / total_s:.1%}" for share in shares),
            )
    console.print(table, highlight=False)
    if is_split:
        meanings = [f"{kind.name}: {kind.value}" for kind in kinds if kind is not Bubble.NO_WORK]
        console.print("; ".join(meanings), highlight=False, soft_wrap=True)


def _hits_line(done: Simulation) -> str:
    schedulers = [replica.scheduler for replica in done.replicas]
    hits = sum(scheduler.prefix_hits for scheduler in schedulers)
    queries = sum(scheduler.prefix_queries for scheduler in schedulers)
    return f"{hits:,} of {queries:,} prompt tokens were kept from before"


def speed_line(simulated_s: float, seconds: float, num_iterations: int) -> str:
    """How much was simulated in how many seconds."""
    return (
        f"{simulated_s:,.1f} s simulated in {seconds:,.1f} s, {num_iterations:,} iterations: "
        f"{num_iterations / max(seconds, 1e-9):,.0f} a second"
    )

"""`stallfree bench`: the commands that make workloads and measure servers with them."""

from __future__ import annotations

import typer

from stallfree.cli.bench_capacity import capacity
from stallfree.cli.bench_serve import report, serve
from stallfree.cli.bench_simulated_capacity import simulated_capacity
from stallfree.cli.bench_workload import workload
from stallfree.cli.options import with_settings

bench = typer.Typer(
    help="Make workloads, and measure servers with them.",
    no_args_is_help=True,
)
bench.command()(with_settings(workload))
bench.command()(with_settings(serve))
bench.command()(with_settings(report))
bench.command()(with_settings(capacity))
bench.command()(with_settings(simulated_capacity))

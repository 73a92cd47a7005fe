"""`stallfree bench workload`: show a workload in numbers, and save it for exact replays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallfree.bench.workload_file import save_workload
from stallfree.bench.workloads import WorkloadStatistics, statistics_of
from stallfree.cli.workload_options import WorkloadSettings

if TYPE_CHECKING:
    from rich.table import Table


def workload(
    settings: WorkloadSettings,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Also write the workload here, for --replay."),
    ] = None,
) -> None:
    """Show a workload in numbers; with --save, write it for exact replays."""
    from rich.console import Console

    made = settings.workload()
    if save is not None:
        save_workload(made, save)
    statistics = statistics_of(made)
    console = Console()
    console.print(made.about, highlight=False, markup=False, soft_wrap=True)
    console.print(_arrivals(statistics, made.clients), highlight=False, soft_wrap=True)
    console.print(length_table(statistics))


def length_table(statistics: WorkloadStatistics) -> Table:
    """The lengths of a workload, in tokens."""
    from rich import box
    from rich.table import Table

    table = Table(title="tokens of a request", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    for title in ("min", "median", "P90", "max", "mean", "std", "of all"):
        table.add_column(title, justify="right")
    rows = {"prompt": statistics.prompt, "answer": statistics.output, "both": statistics.total}
    for name, own in rows.items():
        numbers = (own.min, own.median, own.p90, own.max, own.mean, own.std, own.total)
        table.add_row(name, *(f"{number:,.0f}" for number in numbers))
    return table


def _arrivals(statistics: WorkloadStatistics, clients: int | None) -> str:
    count = f"{statistics.num_requests:,} request{'s' if statistics.num_requests > 1 else ''}"
    if clients is not None:
        return f"{count} from {clients:,} client{'s' if clients > 1 else ''} in a closed loop"
    if statistics.requests_per_s is None:
        return f"{count} at once"
    return (
        f"{count} in {statistics.duration_s:,.1f} s: {statistics.requests_per_s:.4g} a second, "
        f"gaps with a coefficient of variation of {statistics.gap_cv:.2f}"
    )

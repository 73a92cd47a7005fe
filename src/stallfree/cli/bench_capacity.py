"""`stallfree bench capacity`: the highest rate of requests at which a server keeps an SLO."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallfree.bench.capacity import (
    MAX_QPS,
    MIN_QPS,
    Capacity,
    Criterion,
    SearchSettings,
    find_capacities,
)
from stallfree.bench.capacity_report import (
    capacity_json,
    capacity_notes,
    probe_line,
    seed_text,
    time_text,
)
from stallfree.bench.probe_file import ProbeFile
from stallfree.cli import INTERRUPTED
from stallfree.cli.bench_serve import check_outputs, progress_line
from stallfree.cli.endpoint_options import EndpointSettings
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.engine.flags import check_range, parse_duration
from stallfree.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from stallfree.bench.client import Progress
    from stallfree.bench.records import Results
    from stallfree.cli.live_system import LiveSystem

_PANEL = "Search"


def capacity(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="Where the server is: http://127.0.0.1:8000"),
    ],
    workload: WorkloadSettings,
    endpoint: EndpointSettings,
    slo_tbt: Annotated[
        str,
        typer.Option(
            metavar="TIME[,TIME]",
            help="Target for the P99 of all times between tokens: 200ms. Several share their runs.",
            rich_help_panel=_PANEL,
        ),
    ],
    max_delay: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="Most of the median scheduling delay.", rich_help_panel=_PANEL
        ),
    ] = "2s",
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="SEEDS",
            help="How many draws of the workload have a search of their own; the first has "
            "--workload-seed.",
            rich_help_panel=_PANEL,
        ),
    ] = 3,
    precision: Annotated[
        str,
        typer.Option(
            metavar="SHARE",
            help="How near the lowest rate that fails must be.",
            rich_help_panel=_PANEL,
        ),
    ] = "2.5%",
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Keep each run's numbers here, and take from here what was measured already for "
            "this URL, model and workload. Take a new file if the server's own settings change.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Also write the capacities and all runs here.",
            rich_help_panel="Output",
        ),
    ] = None,
) -> None:
    """Find the highest rate of requests at which a server keeps an SLO.

    A rate passes if no request fails, the P99 of the time between tokens is within the target and
    the median request waits at most --max-delay to be begun with. Rates are doubled or halved from
    --qps on (1 unless given), then the gap between passed and failed is halved until it is within
    the precision. Each seed has a search of its own, which gives the interval. Every run lasts
    until its last answer, so the next one finds the server idle. Ctrl-C ends the search.
    """
    from rich.console import Console

    from stallfree.cli.live_system import LiveSystem

    check_outputs(output)
    check_range("qps", workload.qps, MIN_QPS, MAX_QPS)
    criteria = read_criteria(slo_tbt, max_delay)
    settings = SearchSettings(
        seeds=tuple(range(workload.workload_seed, workload.workload_seed + seeds)),
        start_qps=1.0 if workload.qps is None else workload.qps,
        precision=read_share(precision),
    )
    system = LiveSystem(endpoint.endpoint(url), workload)
    file = None if state is None else ProbeFile(state, system.facts())
    try:
        found = _search(system, criteria, settings, file)
    except KeyboardInterrupt:
        kept = "Nothing is kept without --state FILE.jsonl."
        if state is not None:
            kept = f"{state} holds all runs that ended; the same command goes on from there."
        typer.echo(f"Interrupted. {kept}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    print_capacity(Console(), found)
    if output is not None:
        write_capacity(output, found, system.facts())


def _search(
    system: LiveSystem,
    criteria: Sequence[Criterion],
    settings: SearchSettings,
    file: ProbeFile | None,
) -> list[Capacity]:
    """Search, and tell of each run on stderr."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)

    def tell(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    if file is not None:
        tell(_found(file))
    # a line that is drawn anew by a thread of its own would show in the times
    with Live(console=console, auto_refresh=False, transient=True) as live:
        live.update(Text("reading prompts one at a time, without load"), refresh=True)
        prefill = system.measure_unloaded()

        def measure(qps: float, seed: int) -> Results:
            def show(progress: Progress) -> None:
                line = f"seed {seed} at {qps:g}/s: {progress_line(progress)}"
                live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)

            return system.measure(qps, seed, show)

        return find_capacities(
            measure,
            criteria,
            settings,
            file,
            prefill,
            on_probe=lambda probe: tell(probe_line(probe, criteria)),
        )


def read_criteria(slo_tbt: str, max_delay: str) -> list[Criterion]:
    """The criteria of `--slo-tbt` and `--max-delay`.

    Raises:
        ConfigError: a time is none, or there twice.
    """
    delay_s = _duration("max-delay", max_delay)
    targets = [_duration("slo-tbt", each) for each in slo_tbt.split(",")]
    if len(set(targets)) < len(targets):
        raise ConfigError(f"slo-tbt is {slo_tbt!r}; a target is there twice")
    return [Criterion(tbt_s, delay_s) for tbt_s in targets]


def _duration(name: str, text: str) -> float:
    try:
        return parse_duration(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def read_share(text: str) -> float:
    """Read a share: `2.5%` or `0.025`.

    Raises:
        ConfigError: it is neither.
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number) if not rest else None
    except ValueError:
        value = None
    if value is None:
        raise ConfigError(f"precision is {text!r}; write it as 2.5% or 0.025")
    return value / 100 if percent else value


def print_capacity(console: Console, found: Sequence[Capacity]) -> None:
    """Print a table of capacities, and below it what to think of them."""
    from rich import box
    from rich.table import Table

    table = Table(title="capacity, in requests a second", title_justify="left", box=box.SIMPLE)
    for title in ("TBT", "median delay", "mean", "95 % interval"):
        table.add_column(title, justify="right")
    table.add_column("each seed")
    for each in found:
        rule = each.criterion
        interval = each.interval_qps
        table.add_row(
            f"P{100 * rule.quantile:g} within {time_text(rule.tbt_s)}",
            f"within {time_text(rule.max_delay_s)}",
            "-" if each.mean_qps is None else f"{each.mean_qps:.4g}",
            "-" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}",
            ", ".join(seed_text(seed) for seed in each.seeds),
        )
    console.print(table, highlight=False)
    for note in capacity_notes(found):
        console.print(
            f"Note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True
        )


def write_capacity(path: Path, found: Sequence[Capacity], facts: Mapping[str, object]) -> None:
    """Write capacities and their probes as JSON.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(capacity_json(found, facts), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _found(file: ProbeFile) -> str:
    others = (
        f"; {file.num_others} of other servers or workloads stay there" if file.num_others else ""
    )
    return f"{file.path} holds {len(list(file))} runs of this search{others}"

"""The search for a capacity as a user sees it: each run in a line, then a table and a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer

from stallfree.bench.capacity import Capacity
from stallfree.bench.capacity_report import (
    capacity_json,
    capacity_notes,
    probe_line,
    seed_text,
    time_text,
)
from stallfree.bench.capacity_search import capacities_of, find_capacities
from stallfree.bench.probe import PrefillTimes, Probe
from stallfree.bench.probe_file import ProbeFile
from stallfree.bench.progress import OnProgress, Progress
from stallfree.bench.records import Results
from stallfree.cli import INTERRUPTED
from stallfree.cli.bench_serve import progress_line
from stallfree.cli.capacity_options import Wanted
from stallfree.errors import ConfigError, StallfreeError

if TYPE_CHECKING:
    from rich.console import Console


class MeasuredSystem(Protocol):
    """What runs of one workload are measured on, live or simulated."""

    def facts(self) -> Mapping[str, object]:
        """All that a run depends on but its rate and its seed; plain enough for JSON."""
        ...

    def measure_unloaded(self) -> PrefillTimes | None:
        """Times of reading without load; None if it tells when it begins with a request."""
        ...

    def measure(self, qps: float, seed: int, on_progress: OnProgress | None = None) -> Results:
        """One run, see `find_capacities`."""
        ...


def search_capacity(system: MeasuredSystem, wanted: Wanted) -> None:
    """Search, tell of each run on stderr, and print and write what was found.

    A search that ends early prints and writes what it knew by then, if it knew anything.

    Raises:
        Exit: Ctrl-C ended it.
        ConfigError: a file cannot be read or written.
        EndpointError: the server can no longer be measured.
    """
    file = None if wanted.state is None else ProbeFile(wanted.state, system.facts())
    known = list(file or ())
    try:
        _search(system, wanted, file, known)
    except StallfreeError:
        _show(system, wanted, known)
        raise
    except KeyboardInterrupt:
        _show(system, wanted, known)
        kept = "Without --state FILE.jsonl the next search begins anew."
        if file is not None:
            kept = f"{file.path} holds all runs that ended; the same command goes on from there."
        typer.echo(f"Interrupted. {kept}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _show(system, wanted, known)


def _show(system: MeasuredSystem, wanted: Wanted, known: Sequence[Probe]) -> None:
    """Print and write what probes say, unless there is none."""
    from rich.console import Console

    if not known:
        return
    found = capacities_of(known, wanted.criteria, wanted.settings)
    print_capacity(Console(), found)
    if wanted.output is not None:
        write_capacity(wanted.output, found, system.facts())


def _search(
    system: MeasuredSystem, wanted: Wanted, file: ProbeFile | None, known: list[Probe]
) -> None:
    """Search, add each new probe to those that are known, and tell of it on stderr."""
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

        def add(probe: Probe) -> None:
            known.append(probe)
            tell(probe_line(probe, wanted.criteria))

        find_capacities(
            measure,
            wanted.criteria,
            wanted.settings,
            file,
            prefill,
            on_probe=add,
        )


def print_capacity(console: Console, found: Sequence[Capacity]) -> None:
    """Print a table of capacities, and below it what to think of them."""
    from rich import box
    from rich.table import Table

    table = Table(title="capacity, in requests a second", title_justify="left", box=box.SIMPLE)
    for title in ("TBT", "median delay", "mean", "95 % interval"):
        table.add_column(title, justify="right", no_wrap=True)
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
    console.print(table, highlight=False, markup=False)
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

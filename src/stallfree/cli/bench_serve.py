"""`stallfree bench serve`: load on any server with OpenAI's API, and what came of it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallfree.cli import INTERRUPTED
from stallfree.cli.endpoint_options import EndpointSettings, SloSettings
from stallfree.cli.workload_options import WorkloadSettings
from stallfree.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from stallfree.bench.endpoint import Endpoint
    from stallfree.bench.metrics import Slo
    from stallfree.bench.progress import OnProgress, Progress
    from stallfree.bench.records import Results
    from stallfree.bench.report import Table

CONTEXT_SHARE = 0.98  # prompts have about as many tokens as planned, not exactly
_PANEL = "Output"

HtmlOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.html",
        help="Draw every token, and how times spread, on a page that needs no network.",
        rich_help_panel=_PANEL,
    ),
]


def serve(
    url: Annotated[
        str,
        typer.Argument(metavar="URL", help="Where the server is: http://127.0.0.1:8000"),
    ],
    workload: WorkloadSettings,
    endpoint: EndpointSettings,
    targets: SloSettings,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json",
            help="Write everything, with the time of each token.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.csv", help="Write a row for each request.", rich_help_panel=_PANEL
        ),
    ] = None,
    html: HtmlOption = None,
) -> None:
    """Put load on a server with OpenAI's API, whichever it is, and measure each token.

    In an open loop each request is sent at its time, whatever else is under way; with --clients,
    each client waits for its answer. Prompts are random words, sized by the server's own count of
    tokens. Ctrl-C ends the run early and keeps what there is. The exit code is 1 if any request
    failed.
    """
    from rich.console import Console

    check_outputs(output, csv, html)
    results = asyncio.run(_run(endpoint.endpoint(url), workload))
    slo = targets.slo()
    print_report(Console(), results, slo)
    write_results(results, slo, output, csv, html)
    raise typer.Exit(_exit_code(results))


def report(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE.json", help="What --output wrote; several are compared."),
    ],
    targets: SloSettings,
    html: HtmlOption = None,
) -> None:
    """Show results again, with other targets or as a page."""
    from rich.console import Console

    from stallfree.bench.files import read_json
    from stallfree.bench.html import write_html

    check_outputs(html)
    slo = targets.slo()
    runs = [(path.stem, read_json(path)) for path in files]
    for name, results in runs:
        console = Console()
        console.print(name, highlight=False, markup=False, style="bold")
        print_report(console, results, slo)
    if html is not None:
        write_html(html, runs, slo)


def check_outputs(*paths: Path | None) -> None:
    """Refuse files that cannot be written, before minutes of measuring.

    Raises:
        ConfigError: there is no such folder, or a page is asked for and plotly is missing.
    """
    for path in paths:
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ConfigError(f"{path} cannot be written; its folder must be there")
        if path is not None and path.suffix == ".html" and find_spec("plotly") is None:
            raise ConfigError("--html needs plotly: pip install 'stallfree[bench]'")


def print_report(console: Console, results: Results, slo: Slo | None) -> None:
    """Print the tables of a run, and below them what to think of them."""
    from stallfree.bench.metrics import summarize
    from stallfree.bench.report import count_table, latency_table, notes

    summary = summarize(results, slo)
    console.print(results.workload.about, highlight=False, markup=False, soft_wrap=True)
    for table in (latency_table(summary), count_table(results, slo)):
        if table.rows:
            _print_table(console, table)
    for note in notes(results, summary):
        console.print(
            f"Note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True
        )


async def _run(endpoint: Endpoint, settings: WorkloadSettings) -> Results:
    """Measure until the end or Ctrl-C; a second one does not wait."""
    from stallfree.bench.client import run_workload
    from stallfree.bench.endpoint import prepare

    settings.workload()  # what is wrong with it is said before the server is asked
    ready = await prepare(endpoint)
    length = ready.max_model_len
    workload = settings.workload(None if length is None else int(length * CONTEXT_SHARE))
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        with _progress() as on_progress:
            return await run_workload(ready, workload, on_progress, stop=stop)
    finally:
        loop.remove_signal_handler(signal.SIGINT)


@contextmanager
def _progress() -> Iterator[OnProgress | None]:
    """A line on a terminal that says how far the run is; None without a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    text = TextColumn("{task.description}", markup=False)
    with Bar(BarColumn(), text, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(progress: Progress) -> None:
            done = progress.num_answered + progress.num_failed
            line = progress_line(progress)
            bar.update(
                task, completed=done, total=progress.num_planned, description=line, refresh=True
            )

        yield show


def progress_line(progress: Progress) -> str:
    """How far a run is, in a line."""
    speed = progress.num_tokens / progress.elapsed_s if progress.elapsed_s > 0 else 0.0
    return (
        f"{progress.num_sent:,} of {progress.num_planned:,} sent, {progress.num_in_flight:,} in "
        f"flight, {progress.num_answered:,} done, {progress.num_failed:,} failed, "
        f"{speed:,.1f} tokens/s"
    )


def _print_table(console: Console, table: Table) -> None:
    from rich import box
    from rich.table import Table as RichTable

    made = RichTable(box=box.SIMPLE, show_header=any(table.columns))
    for place, column in enumerate(table.columns):
        made.add_column(column, justify="right" if place and any(table.columns) else "left")
    for row in table.rows:
        made.add_row(*row)
    console.print(made, highlight=False, markup=False)


def write_results(
    results: Results, slo: Slo | None, output: Path | None, csv: Path | None, html: Path | None
) -> None:
    """Write a run to the files that are asked for."""
    from stallfree.bench.files import write_csv, write_json
    from stallfree.bench.html import write_html

    if output is not None:
        write_json(output, results, slo)
    if csv is not None:
        write_csv(csv, results)
    if html is not None:
        facts = results.facts
        name = f"{facts.get('model', 'profile')} at {facts.get('endpoint', 'simulation')}"
        write_html(html, [(name, results)], slo)


def _exit_code(results: Results) -> int:
    from stallfree.bench.client import INTERRUPTED as WAS_INTERRUPTED

    if results.facts.get("ended_early") == WAS_INTERRUPTED:
        return INTERRUPTED
    return 1 if any(each.failure is not None for each in results.records) else 0

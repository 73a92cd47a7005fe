"""Progress on stderr, for what takes seconds before there is anything to see."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def progress(shown: bool) -> Progress:
    """A progress bar on stderr, if that is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    return Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
    )

"""Progress on stderr, for what takes seconds before there is anything to see."""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

logger = logging.getLogger(__name__)


class _Progress(Progress):
    """One that logs what it begins where it shows nothing."""

    def add_task(self, description: str, *args: Any, **kwargs: Any) -> TaskID:
        """Begin a task."""
        if self.disable:
            logger.info("%s", description)
        return super().add_task(description, *args, **kwargs)


def progress(shown: bool) -> Progress:
    """A progress bar on stderr, if that is a terminal; else a line of the log for each task."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    return _Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
    )

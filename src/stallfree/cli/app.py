"""The command line as a whole: its commands, its exit codes, and how it ends when interrupted.

Exit codes: 0 done, 1 failed, 2 a flag or setting is wrong (nothing has started), 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from stallfree.cli.bench import bench
from stallfree.cli.chat import chat
from stallfree.cli.generate import generate
from stallfree.cli.options import with_settings
from stallfree.cli.profile import profile
from stallfree.cli.serve import serve
from stallfree.errors import ConfigError, StallfreeError

app = typer.Typer(
    help="An LLM server that never pauses a running answer: chunked prefills, stall-free batching.",
    epilog="Every flag is explained by `stallfree COMMAND --help`.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def run() -> None:
    """Run the command line and exit the process."""
    try:
        app()
    except StallfreeError as error:
        print(f"stallfree: {error}", file=sys.stderr)
        code = 2 if isinstance(error, ConfigError) else 1
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    sys.exit(_flush(code))


def _flush(code: int) -> int:
    """Write out what stdout holds; whoever read it may be gone, which is no reason to complain."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or 1
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def options(
    _show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Options that need no command; typer shows the help of the app itself."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(f"stallfree {installed_version('stallfree')}")


app.command()(with_settings(serve))
app.command()(with_settings(generate))
app.command()(with_settings(chat))
app.command()(with_settings(profile))
app.add_typer(bench, name="bench")

"""`stallfree serve`: build the engine, say what was built, and serve until told to stop."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import typer

from stallfree.engine.settings import API_KEY_VARIABLE, EngineSettings, ServerSettings
from stallfree.errors import ConfigError

if TYPE_CHECKING:
    from stallfree.engine.served import ServedEngine


def serve(engine: EngineSettings, server: ServerSettings) -> None:
    """Serve a model over HTTP, as OpenAI's API.

    Without MODEL it serves the demo model, Qwen2.5-Coder-0.5B-Instruct. When it is ready it prints
    what it runs and a curl line to try. Ctrl-C and SIGTERM let running requests finish, at most for
    the drain timeout; a second Ctrl-C does not wait.
    """
    from stallfree.server.lifecycle import check_start
    from stallfree.server.observability import check_tracing
    from stallfree.server.request_log import configure_logging

    _refuse_empty_key(server)
    configure_logging(server)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is a server to take it
    check_start(server)
    check_tracing(server)

    from rich.console import Console

    from stallfree.cli.summary import print_summary
    from stallfree.server.app import run_server

    console = Console(stderr=True)
    served = _build(engine, server)
    exit_code = run_server(
        served,
        server,
        on_ready=lambda url: print_summary(console, served.facts, engine, server, url),
    )
    raise typer.Exit(exit_code)


def _refuse_empty_key(server: ServerSettings) -> None:
    """Raise ConfigError if a key was meant: an empty variable does not open a server to all."""
    has_key = server.api_key is not None or server.api_keys_file is not None
    if not has_key and os.environ.get(API_KEY_VARIABLE) == "":
        raise ConfigError(f"{API_KEY_VARIABLE} is empty; unset it to need no key")


def _build(engine: EngineSettings, server: ServerSettings) -> ServedEngine:
    """One engine in this process, or several behind one face."""
    if server.replicas > 1:
        from stallfree.replicas.launch import launch

        return launch(engine, server)
    from stallfree.engine.async_engine import AsyncEngine
    from stallfree.engine.build import build_engine

    return AsyncEngine(build_engine(engine))

"""`stallfree serve`: build the engine, say what was built, and serve until told to stop."""

from __future__ import annotations

import signal

import typer

from stallfree.engine.settings import EngineSettings, ServerSettings


def serve(engine: EngineSettings, server: ServerSettings) -> None:
    """Serve a model over HTTP, as OpenAI's API.

    Without MODEL it serves the demo model, Qwen2.5-Coder-0.5B-Instruct. When it is ready it prints
    what it runs and a curl line to try. Ctrl-C and SIGTERM let running requests finish, at most for
    the drain timeout; a second Ctrl-C does not wait.
    """
    from stallfree.server.lifecycle import check_start
    from stallfree.server.observability import check_tracing
    from stallfree.server.request_log import configure_logging

    configure_logging(server)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is a server to take it
    check_start(server)
    check_tracing(server)

    from rich.console import Console

    from stallfree.cli.summary import print_summary
    from stallfree.engine.async_engine import AsyncEngine
    from stallfree.engine.build import build_engine
    from stallfree.server.app import run_server

    console = Console(stderr=True)
    built = build_engine(engine)
    exit_code = run_server(
        AsyncEngine(built),
        server,
        on_ready=lambda url: print_summary(console, built.facts, engine, server, url),
    )
    raise typer.Exit(exit_code)

"""The command `stallfree`: serve, generate and chat. Nothing heavy is imported before it runs."""

from __future__ import annotations

import sys

INTERRUPTED = 130


def main() -> None:
    """Run the command line and exit the process, quietly even if interrupted while it starts."""
    try:
        from stallfree.cli.app import run
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    run()

"""A `stallfree serve` process for the length of a benchmark, and the machine it runs on."""

from __future__ import annotations

import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from stallfree.engine.settings import available_cpus

START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 15.0


class ServerError(Exception):
    """The server did not start, or is not there; the message holds what is known of it."""


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[str]:
    """Run `stallfree serve` with these arguments on a free port; gives its URL.

    The server is killed when the block ends, however it ends.

    Raises:
        ServerError: it ended, or did not become healthy in time.
    """
    port = _free_port()
    command = [sys.executable, "-m", "stallfree.cli", "serve", *arguments, "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            if not _becomes_healthy(process, url):
                log.seek(0)
                raise ServerError(f"{' '.join(command)}\n{log.read()[-2000:]}")
            yield url
        finally:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


def machine_facts() -> dict[str, object]:
    """What a result depends on beside the code."""
    return {
        "cpu": _cpu_model(),
        "cores": available_cpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "stallfree": version("stallfree"),
    }


def _becomes_healthy(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()

"""A server process for the length of a benchmark, and the machine it runs on."""

from __future__ import annotations

import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO

from stallfree.engine.settings import available_cpus

LOAD_AVERAGE = os.getloadavg()  # of 1, 5 and 15 minutes, before anything is measured
START_TIMEOUT_S = 1200.0
STOP_TIMEOUT_S = 15.0


class ServerError(Exception):
    """The server did not start, or is not there; the message holds what is known of it."""


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[str]:
    """Run `stallfree serve` with these arguments on a free port; gives its URL.

    The server is ended when the block ends, however it ends.

    Raises:
        ServerError: it ended, or did not become healthy in time.
    """
    port = free_port()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        running(serve_command(arguments, port), port, log) as url,
    ):
        yield url


def serve_command(arguments: Sequence[str], port: int) -> list[str]:
    """The command line of `stallfree serve` with these arguments."""
    return [sys.executable, "-m", "stallfree.cli", "serve", *arguments, "--port", str(port)]


@contextmanager
def running(
    command: Sequence[str], port: int, log: IO[str], environment: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a server and wait until its `/health` answers; gives its URL.

    When the block ends, however it ends, so do the server and every process that it started.

    Args:
        command: what starts it.
        port: where it will listen on this machine.
        log: an open file for what it prints.
        environment: its variables; None for those of this process.

    Raises:
        ServerError: it ended, or did not become healthy in time.
    """
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        command, stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        if not _becomes_healthy(process, url):
            log.seek(0)
            raise ServerError(f"{shlex.join(command)}\n{log.read()[-2000:]}")
        yield url
    finally:
        _end(process)


def machine_facts() -> dict[str, object]:
    """What a result depends on beside the code."""
    return {
        "cpu": _cpu_model(),
        "cores": available_cpus(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "stallfree": version("stallfree"),
        "commit": _commit(),
        **_int8_facts(),
        "load_average": LOAD_AVERAGE,
    }


def _int8_facts() -> dict[str, object]:
    """What the int8 kernels use here; who only sends a load needs no torch before."""
    from stallfree.kernels import processor
    from stallfree.model.int8 import is_supported, weight_levels

    path = "avx2"
    if processor.HAS_AVX512:
        path = "avx512+vnni" if processor.HAS_VNNI else "avx512"
    return {
        "int8_path": path if is_supported() else "none",
        "weight_levels": weight_levels(),
    }


def _commit() -> str:
    """What is checked out, if this is a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _becomes_healthy(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and its group: gently first, for some would leave shared memory behind."""
    process.terminate()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    with suppress(ProcessLookupError):  # once none of the group is left
        while time.monotonic() < deadline:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(STOP_TIMEOUT_S)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
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

"""Starting the processes of a model, and knowing whether they live."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Protocol

from stallfree.executor.messages import WorkerSpec


class WorkerProcess(Protocol):
    """A worker that was started.

    Attributes:
        connection: to it; its end means that the process has ended.
    """

    connection: Connection

    def how_it_ended(self) -> str:
        """For people, once the connection has ended; waits a moment for the process to end."""
        ...

    def kill(self) -> None:
        """End it at once, whatever it is doing, and wait for its end."""
        ...


class Launcher(Protocol):
    """Starts the workers of a model.

    Attributes:
        host: where they reach this machine.
    """

    host: str

    def start(self, spec: WorkerSpec) -> WorkerProcess:
        """Start a worker.

        Raises:
            WorkersLostError: it could not be started.
        """
        ...

    def close(self) -> None:
        """Give back what was reserved; all workers have ended."""
        ...


class LocalLauncher:
    """Starts workers on this machine."""

    host = "127.0.0.1"

    def start(self, spec: WorkerSpec) -> WorkerProcess:
        """See `Launcher`."""
        return LocalProcess(spec)

    def close(self) -> None:
        """Nothing was reserved."""


class LocalProcess:
    """A worker on this machine.

    It is a new Python that shares nothing with this one but the connection: it runs nothing of the
    user's own script, and holds no other worker's connection open. Ctrl-C does not reach it.

    Args:
        spec: of the worker.
        prefix: a command that runs it, such as `ip netns exec`.
    """

    def __init__(self, spec: WorkerSpec, prefix: Sequence[str] = ()) -> None:
        self.connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "stallfree.executor.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={"GLOO_SOCKET_IFNAME": _loopback(), **os.environ},
                process_group=0,
            )
        self.connection.send(spec)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def how_it_ended(self) -> str:
        """Its signal or exit code."""
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if code < 0:
            return f"it was ended by {signal.Signals(-code).name}"
        return f"it ended with code {code}"

    def kill(self) -> None:
        """SIGKILL: a stopped process is ended too."""
        self._process.kill()
        self._process.wait()
        self.connection.close()


def _loopback() -> str:
    """The interface on which processes of one machine reach each other."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name in ("lo", "lo0")), names[0])

"""A line to another process: messages in both directions, without ever waiting for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any


class Line:
    """Sends and receives in threads, as a process that was stopped does neither.

    Args:
        connection: to the process.
        on_message: called with each message, in a thread; with None when the other end has closed.
    """

    def __init__(self, connection: Connection, on_message: Callable[[Any], None]) -> None:
        self._connection, self._on_message = connection, on_message
        self._payloads: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        for work in (self._send, self._receive):
            threading.Thread(target=work, name="stallfree-line", daemon=True).start()

    def put(self, payload: bytes) -> None:
        """Send a pickled message."""
        self._payloads.put(payload)

    def close(self) -> None:
        """End the sending thread; the other ends with the other process."""
        self._payloads.put(None)

    def _send(self) -> None:
        with suppress(OSError, TypeError):  # it has ended, which the other thread says
            while (payload := self._payloads.get()) is not None:
                self._connection.send_bytes(payload)

    def _receive(self) -> None:
        with suppress(EOFError, OSError, TypeError):
            while True:
                self._on_message(self._connection.recv())
        self._on_message(None)


def pickled(message: object) -> bytes:
    """A message as `Line.put` takes it."""
    return bytes(ForkingPickler.dumps(message))

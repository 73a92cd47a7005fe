"""Connections between a front and its replicas, which know each other by a key."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import (
    Client,
    Connection,
    answer_challenge,
    deliver_challenge,
)

from stallfree.replicas.messages import Place

_PROBE_S = 5.0
_BACKLOG = 64


class Gate:
    """Where replicas call the front; those that do not know the key are turned away.

    Args:
        host: the address to listen on.
        on_call: called with each connection, in a thread of its own.

    Attributes:
        place: what replicas are told.
    """

    def __init__(self, host: str, on_call: Callable[[Connection], None]) -> None:
        self._on_call = on_call
        self._server = socket.create_server((host, 0), backlog=_BACKLOG)
        self.place = Place(host, self._server.getsockname()[1], secrets.token_bytes(32))
        threading.Thread(target=self._accept, name="stallfree-gate", daemon=True).start()

    def close(self) -> None:
        """Take no more calls; connections stay."""
        with suppress(OSError):  # some systems do not know this; the thread then waits on
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                own, _ = self._server.accept()
                connection = Connection(own.detach())
                threading.Thread(
                    target=self._greet, args=(connection,), name="stallfree-greet", daemon=True
                ).start()

    def _greet(self, connection: Connection) -> None:
        """In a thread of its own, as whoever calls may say nothing."""
        key = self.place.key
        try:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            _send_at_once(connection)
        except (AuthenticationError, EOFError, OSError):
            connection.close()
            return
        self._on_call(connection)


def connect(place: Place) -> Connection:
    """Call the front.

    Raises:
        ConnectionRefusedError: nobody listens there: the front has ended.
        OSError: it cannot be reached.
    """
    connection = Client((place.host, place.port), authkey=place.key)
    _send_at_once(connection)
    return connection


def has_ended(place: Place) -> bool:
    """Whether the front has certainly ended: its machine answers, but nobody listens there."""
    try:
        with socket.create_connection((place.host, place.port), _PROBE_S):
            return False
    except ConnectionRefusedError:
        return True
    except OSError:
        return False


def hang_up(connection: Connection) -> None:
    """End a connection for both sides, although a thread reads it."""
    with suppress(OSError), _socket_of(connection) as own:
        own.shutdown(socket.SHUT_RDWR)


def _send_at_once(connection: Connection) -> None:
    """Let no small message wait for the acknowledgement of the last."""
    with _socket_of(connection) as own:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _socket_of(connection: Connection) -> socket.socket:
    return socket.fromfd(connection.fileno(), socket.AF_INET, socket.SOCK_STREAM)

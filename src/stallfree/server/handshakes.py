"""TLS handshakes: how many there may be, and how long each may take.

asyncio tells of a connection when its handshake is done. Until then a client that never ends it
costs a socket and memory too, so here it is counted from the start.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sized
from dataclasses import dataclass

SHUTDOWN_TIMEOUT_S = 5  # how long a client may take to take leave


@dataclass(frozen=True, slots=True)
class HandshakeLimits:
    """What handshakes may take.

    Attributes:
        timeout_s: that each may take.
        max_open: connections, those in a handshake included; one more is closed unheard.
    """

    timeout_s: float
    max_open: int


class Handshakes:
    """Takes TCP connections, and makes a protocol for each whose handshake has ended well.

    Its length is the number of handshakes under way.

    Args:
        context: what is encrypted with.
        limits: of handshakes.
        connections: those that are open and are past their handshake.
        make: makes the protocol of the next.
    """

    def __init__(
        self,
        context: ssl.SSLContext,
        limits: HandshakeLimits,
        connections: Sized,
        make: Callable[[], asyncio.Protocol],
    ) -> None:
        self._context = context
        self._limits = limits
        self._connections = connections
        self._make = make
        self._under_way: dict[asyncio.Transport, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._under_way)

    def accept(self) -> asyncio.Protocol:
        """The protocol of a TCP connection that has come; called by asyncio."""
        return _Accepted(self._begin)

    def abort(self) -> None:
        """End all that are under way."""
        for transport in self._under_way:
            transport.abort()

    def _begin(self, transport: asyncio.Transport) -> None:
        if len(self._connections) + len(self) >= self._limits.max_open:
            transport.abort()
            return
        transport.pause_reading()  # what comes is for the handshake
        self._under_way[transport] = asyncio.ensure_future(self._run(transport))

    async def _run(self, transport: asyncio.Transport) -> None:
        early = _Early()
        try:
            encrypted = await asyncio.get_running_loop().start_tls(
                transport,
                early,
                self._context,
                server_side=True,
                ssl_handshake_timeout=self._limits.timeout_s,
                ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            )
        except OSError:  # the client left, took too long, or speaks something else
            return
        finally:
            del self._under_way[transport]
        if encrypted is None or early.is_lost:  # it left in the middle
            return
        connection = self._make()
        encrypted.set_protocol(connection)
        connection.connection_made(encrypted)
        if early.data:
            connection.data_received(bytes(early.data))


class _Accepted(asyncio.Protocol):
    """A connection that nothing was read of."""

    def __init__(self, begin: Callable[[asyncio.Transport], None]) -> None:
        self._begin = begin

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._begin(transport)


class _Early(asyncio.Protocol):
    """Keeps what a client sends right behind its part of the handshake."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.is_lost = False

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.is_lost = True

"""One connection of a client, and what it may take of the server before it is cut off.

A client that sends slowly or reads slowly costs a socket and a little memory for a bounded time.
The bytes of requests and responses are uvicorn's business, which this extends.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Sized
from contextlib import suppress
from typing import Any, Literal, cast

import h11
from starlette.types import Scope
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from stallfree.engine.limit_settings import LimitSettings
from stallfree.server.errors import ApiError
from stallfree.server.guard import busy, head_too_large
from stallfree.server.request_id import HEADER as REQUEST_ID
from stallfree.server.request_id import RequestNotes
from stallfree.server.sse import ABORT

LINGER_S = 1.0  # for a client to read why it is refused
MAX_LINGERING = 64  # connections over the limit that are told so; others are just closed
MIN_READ_BYTES_PER_S = 1024  # a client that reads less of what waits for it counts as gone

logger = logging.getLogger("stallfree.server")


class Connection(H11Protocol):
    """A connection, with the limits of `settings`; the first three arguments are uvicorn's.

    What it answers itself is told to `notes`, as the ends of all other requests are. Where
    connections are encrypted, those in `handshakes` are open too.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        settings: LimitSettings,
        notes: RequestNotes,
        handshakes: Sized = (),
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._settings = settings
        self._notes = notes
        self._handshakes = handshakes
        self._coming: Literal["head", "body"] | None = None  # part of a request
        self._deadline: asyncio.TimerHandle | None = None  # of that part; later, of this connection
        self._is_refused = False
        self._reader_check: asyncio.TimerHandle | None = None
        self._num_unread = 0  # bytes that waited for the client at the last check
        app = self.app

        async def run(scope: Any, receive: Any, send: Any) -> None:
            scope["extensions"] = {ABORT: self.transport.abort}
            await app(scope, receive, send)

        self.app = run

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; called by asyncio."""
        super().connection_made(transport)
        # Whatever the kernel does not take at once makes a response wait, and starts the clock.
        transport.set_write_buffer_limits(high=1, low=0)
        most = self._settings.max_connections
        num_open = len(self.connections) + len(self._handshakes)
        if num_open > most + MAX_LINGERING:
            transport.abort()
        elif num_open > most:
            self._refuse(busy(f"{num_open - 1} connections are open; the limit is {most}"))
        else:
            self._watch_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of a connection; called by asyncio."""
        super().connection_lost(exc)
        for timer in (self._deadline, self._reader_check):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Take what the client sent; called by asyncio."""
        if not self._is_refused:
            super().data_received(data)
            self._watch_request()

    def on_response_complete(self) -> None:
        """Go on to the next request; called by uvicorn."""
        super().on_response_complete()
        self._watch_request()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Refuse what is not HTTP; called by uvicorn where it catches the error."""
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            num_bytes = len(self.conn.trailing_data[0])
            self._refuse(head_too_large(num_bytes, self._settings.max_header_bytes))
        else:
            self._refuse(ApiError(400, f"this is not an HTTP request: {error}"))

    def pause_writing(self) -> None:
        """Note that the client is behind; called by asyncio."""
        super().pause_writing()
        self._num_unread = self.transport.get_write_buffer_size()
        self._check_reader_later()

    def resume_writing(self) -> None:
        """Note that the client is not behind any more; called by asyncio."""
        super().resume_writing()
        if self._reader_check is not None:
            self._reader_check.cancel()

    def shutdown(self) -> None:
        """Close when the response under way has ended; called by uvicorn."""
        if self._is_refused:
            self.transport.abort()
        else:
            super().shutdown()

    def _watch_request(self) -> None:
        """Begin to count the time of the part of a request that is coming, if it is a new one."""
        coming = self._part()
        if coming == self._coming or self._is_refused:
            return
        self._coming = coming
        if self._deadline is not None:
            self._deadline.cancel()
        if coming is not None:
            self._deadline = self.loop.call_later(self._timeout_s(coming), self._end_of_time)

    def _part(self) -> Literal["head", "body"] | None:
        if self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None:
            return "head"
        return "body" if self.conn.their_state is h11.SEND_BODY else None

    def _timeout_s(self, part: Literal["head", "body"]) -> float:
        settings = self._settings
        return settings.header_timeout_s if part == "head" else settings.body_timeout_s

    def _end_of_time(self) -> None:
        if self._coming is None:
            return
        if self._coming == "head" and not self.conn.trailing_data[0]:  # nobody asked anything
            self.transport.abort()
            return
        limit_s = self._timeout_s(self._coming)
        self._refuse(
            ApiError(408, f"the {self._coming} of the request took over the {limit_s:g} s allowed")
        )

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error, unless an answer has begun; read no more, and close soon."""
        self._is_refused = True
        is_answerable = self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)
        has_request = self.cycle is not None and not self.cycle.response_complete
        if is_answerable:
            note = self._notes.of(cast("Scope", self.scope)) if has_request else self._notes.begin()
            note.refusal = error.status
            self._answer(error, note.request_id)
            if not has_request:  # else the application ends it
                self._notes.end(note)
        if has_request:
            self.cycle.disconnected = True  # whoever waits for the rest of the request
            self.cycle.message_event.set()
        self._linger()

    def _answer(self, error: ApiError, request_id: str) -> None:
        body = json.dumps(error.body()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            REQUEST_ID: request_id,
            **(error.headers or {}),
        }
        answer = (
            h11.Response(status_code=error.status, headers=list(headers.items())),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        with suppress(h11.LocalProtocolError):  # who asked with HEAD gets no body
            for event in answer:
                self.transport.write(self.conn.send(event) or b"")

    def _linger(self) -> None:
        """Close when the client has had time to read: closing while it sends would lose all."""
        self.flow.resume_reading()
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(LINGER_S, self.transport.abort)
        with suppress(OSError):  # the client has left
            if self.transport.can_write_eof():
                self.transport.write_eof()

    def _check_reader_later(self) -> None:
        timeout_s = self._settings.unread_timeout_s
        self._reader_check = self.loop.call_later(timeout_s, self._check_reader)

    def _check_reader(self) -> None:
        """Drop a client that has read next to nothing since the last check."""
        num_unread = self.transport.get_write_buffer_size()
        least = MIN_READ_BYTES_PER_S * self._settings.unread_timeout_s
        if self._num_unread - num_unread < least:
            logger.info("dropped a client that left %d bytes unread", num_unread)
            self.transport.abort()
        else:
            self._num_unread = num_unread
            self._check_reader_later()

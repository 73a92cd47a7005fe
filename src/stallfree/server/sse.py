"""Server-sent events, and work that ends when its client leaves. Knows nothing of the events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stallfree.server.errors import api_error

ABORT = "stallfree.abort"  # extension of a request's scope: closes its connection at once
DONE = b"data: [DONE]\n\n"

_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode

T = TypeVar("T")

logger = logging.getLogger("stallfree.server")


def event(value: object) -> bytes:
    """One event that carries `value` as JSON."""
    return b"data: " + _encode(value).encode() + b"\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves.

    `receive` must have given the whole body of the request already.

    Raises:
        ClientDisconnect: the client left; `work` has ended.
    """
    task = asyncio.ensure_future(work)
    departure = asyncio.ensure_future(_departure(receive))
    try:
        await asyncio.wait({task, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        departure.cancel()
        await asyncio.gather(task, departure, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response that sends each of `events` at once, and closes them when the client leaves.

    It begins with the first event, which may be empty: an error before it becomes the response. A
    later error ends the stream with an event that holds it.

    Args:
        events: the bytes of each, which are taken as they come, whether the client reads or not.
        max_unread_bytes: of events that wait for the client; it is dropped if there are more. With
            None each event is made when the one before was taken.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], max_unread_bytes: int | None) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._max_unread_bytes = max_unread_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response, as ASGI has it."""
        abort: Callable[[], None] = scope["extensions"][ABORT]
        with suppress(ClientDisconnect):
            await while_connected(receive, self._send_all(send, abort))

    async def _send_all(self, send: Send, abort: Callable[[], None]) -> None:
        async with aclosing(self._events):
            first = await anext(self._events)
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            backlog = _Backlog()
            backlog.add(first)
            sender = asyncio.ensure_future(backlog.send_all(send))
            try:
                await self._fill(backlog, abort)
                await sender
            finally:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)

    async def _fill(self, backlog: _Backlog, abort: Callable[[], None]) -> None:
        """Take all events; one after more than may wait drops the client."""
        limit = self._max_unread_bytes
        try:
            async for data in self._events:
                if limit is not None and backlog.num_bytes > limit:
                    logger.info("dropped a client that left %d bytes unread", backlog.num_bytes)
                    abort()
                    await asyncio.Future()  # ends when it is noticed that the client is gone
                backlog.add(data)
                if limit is None:
                    await backlog.taken()
                await asyncio.sleep(0)  # in a burst, too, send, and notice that the client has left
        except Exception as error:
            backlog.add(event(api_error(error).body()))
        backlog.end()


class _Backlog:
    """Bytes on their way to a client, in the order they came."""

    def __init__(self) -> None:
        self.num_bytes = 0  # that wait, but for those being sent
        self._parts: asyncio.Queue[bytes | None] = asyncio.Queue()

    def add(self, data: bytes) -> None:
        """Have `data` sent after what waits."""
        self.num_bytes += len(data)
        self._parts.put_nowait(data)

    async def taken(self) -> None:
        """Wait until the client has taken all of it, as far as is known here."""
        await self._parts.join()

    def end(self) -> None:
        """Say that there is no more."""
        self._parts.put_nowait(None)

    async def send_all(self, send: Send) -> None:
        """Send parts until the end, each when the client has taken what was sent before."""
        while (data := await self._parts.get()) is not None:
            self.num_bytes -= len(data)
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._parts.task_done()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

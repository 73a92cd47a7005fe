"""Server-sent events, and work that ends when its client leaves. Knows nothing of the events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from stallfree.server.errors import api_error

DONE = b"data: [DONE]\n\n"

_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode

T = TypeVar("T")


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
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        """Send the response, as ASGI has it."""
        with suppress(ClientDisconnect):
            await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        has_started = False
        try:
            async with aclosing(self._events):
                async for data in self._events:
                    if not has_started:
                        await send(start)
                        has_started = True
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    await asyncio.sleep(0)  # in a burst, too, notice that the client has left
        except Exception as error:
            if not has_started:
                raise
            data = event(api_error(error).body())
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

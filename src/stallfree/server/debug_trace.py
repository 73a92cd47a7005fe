"""`POST /debug/trace`: what is done in the next seconds, to be opened in Perfetto."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from stallfree.engine.trace import Trace
from stallfree.errors import InvalidRequestError
from stallfree.server.errors import ApiError
from stallfree.server.fields import shown
from stallfree.server.service import Service
from stallfree.server.sse import while_connected

MIN_S, MAX_S, DEFAULT_S = 1, 60, 5
OPENAPI: dict[str, Any] = {
    "parameters": [
        {
            "name": "seconds",
            "in": "query",
            "description": "How long to record.",
            "schema": {
                "type": "number",
                "minimum": MIN_S,
                "maximum": MAX_S,
                "default": DEFAULT_S,
            },
        }
    ],
    "responses": {
        "400": {"description": "`seconds` is wrong, or there is more: a body, other parameters."},
        "409": {"description": "Another trace is being recorded."},
    },
}

_TAKES = f"there is one parameter, in the address: /debug/trace?seconds={DEFAULT_S}"
_POLL_S = 0.1  # how soon a recording ends with the server

_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode


class DebugTrace:
    """The endpoint.

    Args:
        service: what is served.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._is_recording = False

    async def record(self, request: Request) -> Response:
        """A trace of iterations and requests for some seconds, as a file for Perfetto."""
        seconds = _seconds(request.query_params)
        self._service.check_ready()
        async for part in request.stream():
            if part:
                raise InvalidRequestError(f"there is a body, which has no meaning here; {_TAKES}")
        if self._is_recording:
            raise ApiError(409, "another trace is being recorded; try again when it has ended")
        trace = self._service.engine.trace()
        self._is_recording = True
        try:
            await while_connected(request.receive, self._wait(seconds))
        finally:
            self._is_recording = False
            trace.stop()
        return StreamingResponse(
            _file(trace),
            media_type="application/json",
            headers={"Content-Disposition": 'attachment; filename="stallfree-trace.json"'},
        )

    async def _wait(self, seconds: float) -> None:
        """Until the time is over, or the server is about to end."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._service.draining or self._service.engine.error is not None:
                return
            await asyncio.sleep(min(left, _POLL_S))


def _seconds(params: QueryParams) -> float:
    """How long to record, which is the only parameter."""
    for name in params:
        if name != "seconds":
            raise InvalidRequestError(f"there is no parameter {shown(name)}; {_TAKES}")
    text = params.get("seconds", str(DEFAULT_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not MIN_S <= seconds <= MAX_S:
        raise InvalidRequestError(
            f"seconds is {shown(text)}; it must be a number from {MIN_S} to {MAX_S}", "seconds"
        )
    return seconds


async def _file(trace: Trace) -> AsyncGenerator[bytes, None]:
    """The trace in pieces, so that a long one holds up nobody."""
    yield b'{"displayTimeUnit":"ms","traceEvents":[\n'
    separator = b""
    async for events in trace.events():
        yield separator + b",\n".join(_encode(event).encode() for event in events)
        separator = b",\n"
    yield b'\n],"otherData":' + _encode({"is_cut": trace.is_cut}).encode() + b"}\n"

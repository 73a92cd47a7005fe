"""Gives each HTTP request its id, and tells of it when it ends.

The id is the client's own `X-Request-Id` if that is short and clean, else a new one. Every answer
carries it: errors too, and those that a connection gives before there is a whole request.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stallfree.server.request_note import RequestNote, begin_note

HEADER = "X-Request-Id"
TRACE_HEADERS = ("traceparent", "tracestate")  # W3C Trace Context

logger = logging.getLogger("stallfree.server")

_NOTE = "stallfree.note"  # where a scope has the note of its request
_CLEAN = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class RequestNotes:
    """Begins and ends the notes of requests.

    Args:
        now: the engine's clock.
        keeps_text: whether prompts and answers may be logged.
        watchers: called with the note of each request that ended, in order.
    """

    def __init__(
        self,
        now: Callable[[], float],
        keeps_text: bool,
        watchers: Sequence[Callable[[RequestNote], None]],
    ) -> None:
        self._now = now
        self._keeps_text = keeps_text
        self._watchers = watchers

    def of(self, scope: Scope) -> RequestNote:
        """The note of the request that `scope` describes; the first to ask begins it."""
        note: RequestNote | None = scope.get(_NOTE)
        if note is None:
            headers = Headers(scope=scope)
            note = self.begin(scope["method"])
            given = headers.get(HEADER, "")
            if _CLEAN.fullmatch(given):
                note.request_id = given
            note.trace_headers = {name: headers[name] for name in TRACE_HEADERS if name in headers}
            scope[_NOTE] = note
        return note

    def begin(self, method: str = "") -> RequestNote:
        """The note of a request of which no more is known."""
        return RequestNote(method=method, started_at=self._now(), keeps_text=self._keeps_text)

    def end(self, note: RequestNote) -> None:
        """Tell the watchers of a request that ended."""
        note.ended_at = self._now()
        if note.refusal is not None:
            note.status = note.refusal
        for watcher in self._watchers:
            try:
                watcher(note)
            except Exception:  # whatever is wrong with it, the request was answered
                logger.exception("the end of request %s was not told to all", note.request_id)


class RequestIds:
    """ASGI middleware outside of all other.

    Args:
        app: what answers.
        notes: of the requests.
    """

    def __init__(self, app: ASGIApp, notes: RequestNotes) -> None:
        self._app = app
        self._notes = notes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note = self._notes.of(scope)
        begin_note(note)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                note.status = message["status"]
                MutableHeaders(scope=message)[HEADER] = note.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            note.status = 500
            raise
        finally:
            path = getattr(scope.get("route"), "path", None)
            if isinstance(path, str):
                note.endpoint = path
            self._notes.end(note)

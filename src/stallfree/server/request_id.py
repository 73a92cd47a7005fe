"""Gives each HTTP request its id, and tells of it when it ends. ASGI middleware.

The id is the client's own `X-Request-Id` if that is short and clean, else a new one. Every answer
carries it, errors too.
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

_CLEAN = re.compile(r"[A-Za-z0-9._:-]{1,64}")


class RequestIds:
    """Middleware outside of all other.

    Args:
        app: what answers.
        now: the engine's clock.
        keeps_text: whether prompts and answers may be logged.
        watchers: called with the note of each request that ended, in order.
    """

    def __init__(
        self,
        app: ASGIApp,
        now: Callable[[], float],
        keeps_text: bool,
        watchers: Sequence[Callable[[RequestNote], None]],
    ) -> None:
        self._app = app
        self._now = now
        self._keeps_text = keeps_text
        self._watchers = watchers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        note = self._note_of(scope)
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
            note.ended_at = self._now()
            self._tell(note)

    def _tell(self, note: RequestNote) -> None:
        for watcher in self._watchers:
            try:
                watcher(note)
            except Exception:  # whatever is wrong with it, the request was answered
                logger.exception("the end of request %s was not told to all", note.request_id)

    def _note_of(self, scope: Scope) -> RequestNote:
        headers = Headers(scope=scope)
        note = RequestNote(
            method=scope["method"], started_at=self._now(), keeps_text=self._keeps_text
        )
        given = headers.get(HEADER, "")
        if _CLEAN.fullmatch(given):
            note.request_id = given
        note.trace_headers = {name: headers[name] for name in TRACE_HEADERS if name in headers}
        return note

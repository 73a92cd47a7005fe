"""The live page: its files, and the feed that it draws.

The page is the same for everyone and needs no key. The feed does, if the server has one: events,
first a `snapshot`, then `records`, several times a second while there are any. Where the model runs
in several copies it shows one of them, which `?replica=` names, and how busy the others are.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from stallfree.engine.live_view import RECORDS_AT_ONCE, Sight, Watched
from stallfree.errors import InvalidRequestError, ReplicaLostError
from stallfree.server.access import owner_of
from stallfree.server.errors import ApiError
from stallfree.server.fields import shown
from stallfree.server.service import Service
from stallfree.server.sse import EventStream, event

MAX_WATCHERS = 8
MAX_WATCHERS_OF_A_KEY = 4  # that has a name, so that it does not take all places
PERIOD_S = 0.2  # between events of records
HEARTBEAT_S = 1.0  # between events that say nothing but that the server is there

PAGE = "index.html"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PLACE = re.compile("[0-9]{1,6}")
_MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


def add_dashboard(app: FastAPI, watching: APIRouter) -> None:
    """Serve the page from `app`, and its feed from `watching`."""
    for name, content in _static_files():
        path = "/dashboard" if name == PAGE else f"/dashboard/{name}"
        file = Response(content, headers=HEADERS, media_type=_MEDIA_TYPES[PurePath(name).suffix])
        app.add_route(path, partial(_give, file), ["GET"], include_in_schema=False)
    feed = Feed(app.state.service)

    async def stream(request: Request) -> Response:
        events = feed.events(owner_of(request), _place_of(request.query_params))
        return EventStream(events, max_unread_bytes=None)

    watching.add_api_route("/dashboard/feed", stream, methods=["GET"], include_in_schema=False)


class Feed:
    """What the watchers are sent.

    Args:
        service: whose engine is watched, or one copy of the model.

    Attributes:
        watchers: how many are sent something now, by the name of their key; empty if it has none.
    """

    def __init__(self, service: Service) -> None:
        self.watchers: Counter[str] = Counter()
        self._service = service

    async def events(self, owner: str, place: int | None) -> AsyncGenerator[bytes, None]:
        """The events of one watcher, whose key has the name `owner`, until the engine ends.

        They are made when the one before was taken, so whoever reads slowly takes no memory: the
        records that were forgotten meanwhile are `lost`. If the copy of the model at `place` is
        lost, it is over.

        Raises:
            ApiError: before the first event, there are too many watchers.
            NoReplicaError: the copy at `place` is not ready; also before the first event.
            InvalidRequestError: there are no copies; the same.
        """
        with self._place(owner):
            watched = self._service.engine.watch(place)
            sight = await watched.look(None)
            yield event({"type": "snapshot", **self._about(watched, sight), **self._state(sight)})
            with suppress(ReplicaLostError):
                async with aclosing(self._records(watched, sight.first)) as events:
                    async for each in events:
                        yield each

    async def _records(self, watched: Watched, number: int) -> AsyncGenerator[bytes, None]:
        """The events after the snapshot, with the records from `number` on."""
        silent_s = 0.0
        while True:
            is_over = self._is_over  # before the records, so that it comes with all of them
            sight = await watched.look(number)
            lost, number = sight.first - number, sight.first + len(sight.records)
            if sight.records or lost or silent_s >= HEARTBEAT_S:
                silent_s = 0.0
                records = {"first": sight.first, "lost": lost, "records": sight.records}
                yield event({"type": "records", **records, **self._state(sight)})
            if len(sight.records) == RECORDS_AT_ONCE:
                continue
            if is_over:
                return
            await asyncio.sleep(PERIOD_S)
            silent_s += PERIOD_S

    @contextmanager
    def _place(self, owner: str) -> Iterator[None]:
        if self.watchers.total() >= MAX_WATCHERS:
            raise _too_many(f"{MAX_WATCHERS} watch already, which is the limit")
        if owner and self.watchers[owner] >= MAX_WATCHERS_OF_A_KEY:
            raise _too_many(
                f"the key {owner!r} watches {MAX_WATCHERS_OF_A_KEY} times already, which is the "
                "limit of each"
            )
        self.watchers[owner] += 1
        try:
            yield
        finally:
            self.watchers[owner] -= 1

    @property
    def _is_over(self) -> bool:
        """Whether no record comes any more: the engine died, or has drained."""
        engine = self._service.engine
        has_drained = self._service.draining and not engine.num_running + engine.num_waiting
        return engine.error is not None or has_drained

    def _state(self, sight: Sight) -> dict[str, Any]:
        """What holds at the moment, in the engine that is watched and beside it."""
        replicas = [
            {
                "replica": each.index,
                "ready": each.is_ready,
                "running": each.num_running,
                "waiting": each.num_waiting,
            }
            for each in self._service.engine.replicas
        ]
        return {"status": self._service.status, "replicas": replicas, **sight.state}

    def _about(self, watched: Watched, sight: Sight) -> dict[str, Any]:
        """What the watched engine is, and holds."""
        assert sight.about is not None, "it is the first sight"
        return {
            "version": version("stallfree"),
            "model": self._service.model_name,
            "replica": watched.index,
            **sight.about,
        }


def _place_of(params: QueryParams) -> int | None:
    """Which copy of the model is asked for."""
    text = params.get("replica")
    if text is None:
        return None
    if not _PLACE.fullmatch(text):
        raise InvalidRequestError(f"replica is {shown(text)}; it must be a whole number", "replica")
    return int(text)


def _too_many(message: str) -> ApiError:
    headers = {"Retry-After": "5"}
    return ApiError(429, message, code="too_many_watchers", headers=headers)


async def _give(response: Response, _: Request) -> Response:
    return response


def _static_files() -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of the page."""
    for file in (resources.files("stallfree.server") / "static").iterdir():
        yield file.name, file.read_bytes()

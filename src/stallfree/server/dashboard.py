"""The live page: its files, and the feed that it draws.

The page is the same for everyone and needs no key. The feed does, if the server has one: events,
first a `snapshot`, then `records`, several times a second while there are any.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from stallfree.engine.engine import Engine
from stallfree.server.access import owner_of
from stallfree.server.errors import ApiError
from stallfree.server.live_feed import LiveFeed, load_of
from stallfree.server.service import Service
from stallfree.server.sse import EventStream, event

MAX_WATCHERS = 8
MAX_WATCHERS_OF_A_KEY = 4  # that has a name, so that it does not take all places
PERIOD_S = 0.2  # between events of records
HEARTBEAT_S = 1.0  # between events that say nothing but that the server is there
RECORDS_PER_EVENT = 256

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
_MEDIA_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}


def add_dashboard(app: FastAPI, watching: APIRouter) -> None:
    """Serve the page from `app`, its feed from `watching`; before the engine's thread starts.

    Where the model runs in several copies, whose iterations are elsewhere, it is not there: say so.
    """
    service: Service = app.state.service
    engine = service.engine.local
    if engine is None:
        for path in ("/dashboard", "/dashboard/{rest:path}"):
            app.add_route(path, _refuse, ["GET"], include_in_schema=False)
        return
    for name, content in _static_files():
        path = "/dashboard" if name == PAGE else f"/dashboard/{name}"
        file = Response(content, headers=HEADERS, media_type=_MEDIA_TYPES[PurePath(name).suffix])
        app.add_route(path, partial(_give, file), ["GET"], include_in_schema=False)
    feed = Feed(service, engine)
    engine.observers.add(feed.live)

    async def stream(request: Request) -> Response:
        return EventStream(feed.events(owner_of(request)), max_unread_bytes=None)

    watching.add_api_route("/dashboard/feed", stream, methods=["GET"], include_in_schema=False)


class Feed:
    """What the watchers of one engine are sent.

    Args:
        service: tells whether it goes on.
        engine: that of the service.

    Attributes:
        live: to be told of requests and iterations.
        watchers: how many are sent something now, by the name of their key; empty if it has none.
    """

    def __init__(self, service: Service, engine: Engine) -> None:
        self._engine = engine
        self.live = LiveFeed(service.engine.now)
        self.watchers: Counter[str] = Counter()
        self._service = service

    async def events(self, owner: str) -> AsyncGenerator[bytes, None]:
        """The events of one watcher, whose key has the name `owner`, until the engine ends.

        They are made when the one before was taken, so whoever reads slowly takes no memory: the
        records that were forgotten meanwhile are `lost`.

        Raises:
            ApiError: before the first event, there are too many watchers.
        """
        history = self.live.history
        with self._place(owner):
            snapshot = {"type": "snapshot", "next": history.count, **self._settings()}
            number = history.first
            yield event({**snapshot, "requests": self.live.live(), **self._state()})
            silent_s = 0.0
            while True:
                state = self._state()  # before the records, so that an end comes with all of them
                first, records = history.since(number, RECORDS_PER_EVENT)
                lost, number = first - number, first + len(records)
                if records or lost or silent_s >= HEARTBEAT_S:
                    silent_s = 0.0
                    yield event(
                        {
                            "type": "records",
                            "first": first,
                            "lost": lost,
                            "records": records,
                            **state,
                        }
                    )
                if len(records) == RECORDS_PER_EVENT:
                    continue
                if self._is_over:
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

    def _state(self) -> dict[str, Any]:
        """What holds at the moment."""
        service, scheduler = self._service, self._engine.scheduler
        return {
            "now": service.engine.now(),
            "status": service.status,
            **load_of(scheduler),
            "preemptions": dict(scheduler.preemptions),
            "squeezed": scheduler.budget.squeezed.iterations,
        }

    def _settings(self) -> dict[str, Any]:
        """What the engine was built with."""
        engine = self._engine
        facts, scheduler = engine.facts, engine.scheduler
        return {
            "version": version("stallfree"),
            "model": self._service.model_name,
            "architecture": facts.architecture,
            "dtype": facts.dtype,
            "device": facts.device,
            "threads": facts.threads,
            "scheduler": facts.scheduler,
            "token_budget": facts.token_budget,
            "tbt_slo_s": facts.tbt_slo_s,
            "tiers": {
                name: {"tbt_s": targets.tbt_s, "ttft_s": targets.ttft_s}
                for name, targets in engine.tiers.items()
            },
            "max_model_len": facts.max_model_len,
            "max_num_seqs": facts.max_num_seqs,
            "num_blocks": scheduler.pool.num_blocks,
            "block_size": scheduler.pool.block_size,
        }


async def _refuse(_: Request) -> Response:
    raise ApiError(404, "the live page shows one engine: it is there without --replicas only")


def _too_many(message: str) -> ApiError:
    headers = {"Retry-After": "5"}
    return ApiError(429, message, code="too_many_watchers", headers=headers)


async def _give(response: Response, _: Request) -> Response:
    return response


def _static_files() -> Iterator[tuple[str, bytes]]:
    """Name and content of each file of the page."""
    for file in (resources.files("stallfree.server") / "static").iterdir():
        yield file.name, file.read_bytes()

"""`stallfree serve`, and a page that tells what is in it: what `soak.py` and the tests count.

    python benchmarks/watched_server.py serve MODEL --port 8000 ...
    curl http://127.0.0.1:8000/watch

Everything else is as in `stallfree serve`, whose flags it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fastapi import FastAPI

from stallfree.cli import main
from stallfree.core.blocks import IntegrityError
from stallfree.core.request import FinishReason, Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import Targets
from stallfree.engine.async_engine import AsyncEngine
from stallfree.engine.observer import IterationRecord
from stallfree.errors import OverloadedError
from stallfree.server import app as server_app

KEPT = 512  # ends of iterations and requests that are remembered
PROC = Path("/proc/self")
# Pools of threads, which start when needed and are never more than so many; asyncio has its own.
POOLS = ("stallfree-text", "stallfree-large-text", "stallfree-template", "asyncio_")

Extension = Callable[[FastAPI, AsyncEngine], None]


class Watch:
    """An observer that accounts for every request, and the page that shows its account."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._live: dict[str, Request] = {}
        self._num_added = self._num_refused = 0
        self._ended: Counter[str] = Counter()
        self._wrong: list[str] = []  # requests that began or ended twice, or ended unknown
        self._num_iterations = self._num_failed = 0
        self._iterations_s: deque[float] = deque(maxlen=KEPT)
        self._ends: deque[dict[str, Any]] = deque(maxlen=KEPT)

    def added(self, request: Request) -> None:
        """See `Observer`."""
        self._num_added += 1
        if self._live.setdefault(request.request_id, request) is not request:
            self._wrong.append(request.request_id)

    def refused(self, targets: Targets, error: OverloadedError) -> None:  # noqa: ARG002
        """See `Observer`."""
        self._num_refused += 1

    def iterated(self, record: IterationRecord, scheduler: Scheduler) -> None:  # noqa: ARG002
        """See `Observer`."""
        self._num_iterations += 1
        self._num_failed += record.is_failed
        self._iterations_s.append(record.ended_s)

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        """See `Observer`."""
        if self._live.pop(request.request_id, None) is not request:
            self._wrong.append(request.request_id)
        self._ended[reason.value] += 1
        own = {"id": request.request_id, "reason": reason.value, "at_s": now}
        own["num_preemptions"] = request.num_preemptions
        self._ends.append(own)

    async def answer(self) -> dict[str, Any]:
        """All that is known, taken between two iterations."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[dict[str, Any]] = loop.create_future()
        num_tasks = len(asyncio.all_tasks())

        def take() -> None:
            loop.call_soon_threadsafe(done.set_result, self._state())

        self._engine._inbox.put(take)
        return {**await done, "tasks": num_tasks}

    def _state(self) -> dict[str, Any]:
        engine, scheduler = self._engine.engine, self._engine.engine.scheduler
        broken = None
        try:
            scheduler.check_integrity()
        except IntegrityError as error:
            broken = str(error)
        return {
            "added": self._num_added,
            "refused": self._num_refused,
            "ended": dict(self._ended),
            "wrong": self._wrong,
            "live": {each.request_id: _shown(each) for each in self._live.values()},
            "known": engine._completions.num_known,
            "streams": len(self._engine._streams),
            "integrity": broken,
            "blocks": scheduler.pool.num_blocks - scheduler.pool.num_free,
            "iterations": self._num_iterations,
            "failed_iterations": self._num_failed,
            "iterations_s": list(self._iterations_s),
            "ends": list(self._ends),
            "threads": sorted(
                each.name for each in threading.enumerate() if not each.name.startswith(POOLS)
            ),
            "files": len(os.listdir(PROC / "fd")),
            "rss_bytes": int((PROC / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        }


def _shown(request: Request) -> dict[str, Any]:
    return {
        "state": request.state.value,
        "output_tokens": request.num_output_tokens,
        "num_preemptions": request.num_preemptions,
        "blocks": len(request.block_table),
        "max_tokens": request.max_tokens,
    }


def run(arguments: Sequence[str], extensions: Sequence[Extension] = ()) -> None:
    """Run the command line of stallfree with these arguments; a server of it is watched.

    Args:
        arguments: such as those of `stallfree serve`.
        extensions: do more to the application before it starts.
    """
    create = server_app.create_app

    def create_watched(engine: AsyncEngine, *others: Any, **named: Any) -> FastAPI:
        app = create(engine, *others, **named)
        watch = Watch(engine)
        engine.engine.observers.add(watch)
        app.add_api_route("/watch", watch.answer, methods=["GET"])
        for extend in extensions:
            extend(app, engine)
        return app

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(server_app, "create_app", create_watched))
        stack.enter_context(patch.object(sys, "argv", ["stallfree", *arguments]))
        main()


if __name__ == "__main__":
    run(sys.argv[1:])

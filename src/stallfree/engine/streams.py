"""From the engine's thread to event loops: where the deltas of each request go.

Streams are opened and closed in event loops. The engine's thread delivers, and never waits.
"""

from __future__ import annotations

import asyncio
import logging

from stallfree.engine.outputs import Delta
from stallfree.errors import EngineError, InvalidRequestError

logger = logging.getLogger(__name__)


class Stream:
    """Where the deltas of one request go: a queue of the event loop that makes it.

    Args:
        num_completions: of the request.

    Attributes:
        open: completions that have not ended.
    """

    def __init__(self, num_completions: int) -> None:
        self.open = set(range(num_completions))
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    def put(self, item: Delta | Exception | None) -> None:
        """Deliver from the engine's thread: a delta, why it was refused, or None: accepted."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the event loop has closed: nobody listens any more
            logger.debug("a delta came after its event loop had closed")

    async def get(self) -> Delta | None:
        """What is next; raises why the request was refused."""
        item = await self._items.get()
        if isinstance(item, Exception):
            raise item
        return item


class Streams:
    """The streams of all requests that have not ended, by their ids."""

    def __init__(self) -> None:
        self._streams: dict[str, Stream] = {}

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def request_ids(self) -> list[str]:
        """Of those that are open now."""
        return list(self._streams)

    def open(self, request_id: str, num_completions: int) -> Stream:
        """A stream for a request.

        Raises:
            InvalidRequestError: the id is in use.
        """
        if request_id in self._streams:
            raise InvalidRequestError(f"request id {request_id!r} is in use")
        stream = self._streams[request_id] = Stream(num_completions)
        return stream

    def close(self, request_id: str) -> None:
        """Nobody listens to a request any more."""
        self._streams.pop(request_id, None)

    def deliver(self, delta: Delta) -> None:
        """Hand a delta to whoever listens."""
        stream = self._streams.get(delta.request_id)
        if stream is not None:
            if delta.finish_reason is not None:
                stream.open.discard(delta.index)
            stream.put(delta)

    def end_all(self, reason: str, error: EngineError) -> None:
        """Tell all who listen that their completions have ended, and why."""
        for request_id, stream in list(self._streams.items()):
            for index in sorted(stream.open):
                stream.put(Delta(request_id, index, "", finish_reason=reason, error=error))

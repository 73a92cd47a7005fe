"""A trace under way, of one engine or of several, as a server asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from itertools import islice
from typing import Protocol

from stallfree.engine.trace_recorder import TraceRecorder

Event = dict[str, object]  # of Chrome's traces

_EVENTS_AT_ONCE = 200  # that are made before others have their turn


class Trace(Protocol):
    """What happens from when this was made until it is stopped."""

    @property
    def is_cut(self) -> bool:
        """Whether something was left out; known once all events were given."""
        ...

    def stop(self) -> None:
        """Record nothing more."""
        ...

    def events(self) -> AsyncGenerator[Sequence[Event], None]:
        """All events, some at a time; called once, after it was stopped."""
        ...


class EngineTrace:
    """A `Trace` of an engine in this process.

    Args:
        recorder: one of its observers, which records nothing at the moment.
        now: its clock, in seconds.
    """

    def __init__(self, recorder: TraceRecorder, now: Callable[[], float]) -> None:
        self._recorder, self._now = recorder, now
        self._recording = recorder.start(now())

    @property
    def is_cut(self) -> bool:
        """See `Trace`."""
        return self._recording.is_cut

    def stop(self) -> None:
        """See `Trace`."""
        self._recorder.stop()

    async def events(self) -> AsyncGenerator[Sequence[Event], None]:
        """See `Trace`."""
        events = self._recording.events(self._now())
        while some := list(islice(events, _EVENTS_AT_ONCE)):
            yield some
            await asyncio.sleep(0)

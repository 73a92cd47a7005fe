"""Traces of replicas, put together to one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress

from stallfree.engine.trace import Event
from stallfree.engine.trace_recorder import GROUPS
from stallfree.replicas.messages import Recorded

_SILENT_S = 5.0  # how long a replica may be silent before the rest of its trace is left out


class ReplicaTrace:
    """What one replica records until it is stopped, and sends then: a `Trace`.

    Args:
        stop: tells the replica to stop, and to send.
        clock_offset_s: this machine's clock less that of the replica.

    Attributes:
        is_cut: see `Trace`.
    """

    def __init__(self, stop: Callable[[], None], clock_offset_s: float) -> None:
        self.is_cut = False
        self._stop, self._clock_offset_s = stop, clock_offset_s
        self._parts: asyncio.Queue[Recorded | None] = asyncio.Queue()

    def stop(self) -> None:
        """See `Trace`."""
        self._stop()

    def take(self, part: Recorded | None) -> None:
        """A part came; or None, as the replica is lost."""
        self._parts.put_nowait(part)

    async def events(self) -> AsyncGenerator[Sequence[Event], None]:
        """See `Trace`; by this machine's clock."""
        while True:
            part: Recorded | None = None
            with suppress(TimeoutError):
                part = await asyncio.wait_for(self._parts.get(), _SILENT_S)
            if part is None or part.is_last:
                self.is_cut = part is None or part.is_cut
                return
            yield [self._translated(event) for event in part.events]

    def _translated(self, event: Event) -> Event:
        at_us = event.get("ts")
        if not isinstance(at_us, int):  # a name
            return event
        return {**event, "ts": at_us + round(self._clock_offset_s * 1e6)}


class FleetTrace:
    """The traces of several replicas, each in processes of its own: a `Trace`.

    Args:
        traces: by the places of the replicas.
    """

    def __init__(self, traces: Mapping[int, ReplicaTrace]) -> None:
        self._traces = traces

    @property
    def is_cut(self) -> bool:
        """See `Trace`."""
        return any(each.is_cut for each in self._traces.values())

    def stop(self) -> None:
        """See `Trace`."""
        for each in self._traces.values():
            each.stop()

    async def events(self) -> AsyncGenerator[Sequence[Event], None]:
        """See `Trace`."""
        for place, trace in self._traces.items():
            async for events in trace.events():
                yield [_placed(event, place) for event in events]


def _placed(event: Event, place: int) -> Event:
    """An event among those of other replicas."""
    group, args = event["pid"], event["args"]
    assert isinstance(group, int), "of a trace recorder"
    assert isinstance(args, dict), "of a trace recorder"
    if event["name"] == "process_name":
        args = {"name": f"replica {place}: {args['name']}"}
    return {**event, "pid": len(GROUPS) * place + group, "args": args}

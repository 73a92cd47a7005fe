"""Which replicas there are: who calls, who is ready, who is lost.

All this happens in the event loop once it runs; before, in the threads that hear of it, one at a
time.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

from stallfree.errors import ReplicaLostError, StallfreeError, WorkersLostError
from stallfree.replicas.member import Member
from stallfree.replicas.messages import (
    Events,
    Failed,
    Hello,
    Looked,
    Measured,
    Place,
    Ready,
    Recorded,
    Welcome,
)
from stallfree.replicas.wire import Gate, hang_up

LOADING_TIMEOUT_S = 900.0  # of a large model from a slow disk, or with kernels to compile
_POLL_S = 0.1
_WATCH_S = 0.5

logger = logging.getLogger(__name__)


class Fleet(Protocol):
    """Starts replicas, and others in place of those that are lost.

    Attributes:
        host: where they reach this machine.
        error: why it cannot, if so.
    """

    host: str
    error: StallfreeError | None

    def start(self, place: Place) -> None:
        """Start all replicas, which call `place`; returns at once."""
        ...

    def check_progress(self, num_called: int, seconds: float) -> None:
        """Judge, while replicas are started, that only so many have called after some seconds.

        Raises:
            ConfigError: there is no room for more.
        """
        ...

    def close(self) -> None:
        """End all replicas, and what was started for them."""
        ...


class Roster:
    """The replicas of a fleet.

    Args:
        fleet: starts them; closed when this is.
        count: how many there are to be.
        timeout_s: how long one may be silent.

    Attributes:
        count: how many there are to be.
        members: those that have called, and are not lost.

    Raises:
        StallfreeError: a replica could not be built, or started.
    """

    def __init__(self, fleet: Fleet, count: int, timeout_s: float) -> None:
        self.count = count
        self.members: list[Member] = []
        self._fleet, self._timeout_s = fleet, timeout_s
        self._is_closed = False
        self._failure: StallfreeError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = threading.Condition()
        self._gate: Gate | None = None
        try:
            self._gate = Gate(fleet.host, self._called)
            fleet.start(self._gate.place)
            self._await_all()
        except BaseException:
            self.close()
            raise

    @property
    def ready(self) -> list[Member]:
        """Those that take requests."""
        return [each for each in self.members if each.report is not None]

    def start(self) -> None:
        """Belong to this event loop from now on."""
        with self._news:
            self._loop = asyncio.get_running_loop()
        self._watch = asyncio.ensure_future(self._watch_all())

    def close(self) -> None:
        """End all replicas. A second time does nothing."""
        with self._news:
            if self._is_closed:
                return
            self._is_closed = True
        self._fleet.close()
        if self._gate is not None:
            self._gate.close()
        for member in list(self.members):
            member.end()

    def _await_all(self) -> None:
        """Wait until all replicas are ready for the first time.

        Raises:
            StallfreeError: one could not be built, or started.
        """
        started = time.monotonic()
        with self._news:
            while len(self.ready) < self.count:
                error = self._failure or self._fleet.error
                if error is not None:
                    raise error
                waited_s = time.monotonic() - started
                if waited_s > LOADING_TIMEOUT_S:
                    raise WorkersLostError(
                        f"{len(self.ready)} of {self.count} replicas are ready after "
                        f"{waited_s:.0f} s"
                    )
                self._fleet.check_progress(len(self.members), waited_s)
                self._news.wait(_POLL_S)

    def _called(self, connection: Connection) -> None:
        """A replica calls; in a thread of its own."""
        try:
            hello = connection.recv()
            connection.send(Welcome(is_first=self._loop is None))
        except (EOFError, OSError):
            connection.close()
            return
        assert isinstance(hello, Hello), f"{hello} came first"
        self._post(lambda: self._join(connection, hello))

    def _join(self, connection: Connection, hello: Hello) -> None:
        """Take a replica in, in the first free place."""
        if self._is_closed:
            hang_up(connection)
            return
        if len(self.members) == self.count:  # one of them is lost, which was not noticed yet
            self._lose(min(self.members, key=lambda each: each.heard_at), "it was replaced")
        taken = {each.index for each in self.members}
        index = next(index for index in range(self.count) if index not in taken)
        member = Member(connection, hello, index)
        self.members.append(member)
        member.listen(lambda message: self._post(lambda: self._take(member, message)))

    def _take(self, member: Member, message: Any) -> None:
        """A replica says something."""
        if member not in self.members:
            return
        match message:
            case None:
                self._lose(member, "its connection ended")
            case Failed(error):
                self._failure = error
                logger.error("%s could not be built: %s", member.name, error)
            case Ready(facts):
                member.is_loaded(facts)
                logger.info("%s is ready", member.name)
            case Events() | Measured() | Looked() | Recorded():
                member.take(message)

    def _lose(self, member: Member, reason: str) -> None:
        """A replica is lost: its requests fail, or are run by another."""
        self.members.remove(member)
        member.fail(
            ReplicaLostError(
                f"the copy of the model that wrote this answer was lost ({reason}): what came "
                "until here is not all of it"
            )
        )
        member.end()
        if not self._is_closed:
            logger.error("%s was lost: %s", member.name, reason)

    async def _watch_all(self) -> None:
        """Notice replicas that say nothing any more."""
        looked_at = time.monotonic()
        while not self._is_closed:
            await asyncio.sleep(_WATCH_S)
            now = time.monotonic()
            if now - looked_at < 2 * _WATCH_S:  # else it was this process that did not run
                for member in self.ready:
                    if now - member.heard_at > self._timeout_s:
                        self._lose(member, f"it was silent for {self._timeout_s:g} s")
            looked_at = now

    def _post(self, action: Callable[[], None]) -> None:
        """Do something in the event loop; before it runs, at once in whatever thread this is."""
        with self._news:
            if self._loop is None:
                action()
                self._news.notify_all()
                return
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(action)

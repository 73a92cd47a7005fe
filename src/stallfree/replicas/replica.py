"""One copy of the model: an engine in this process that runs what its front sends it."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import aclosing, suppress

from stallfree.engine.async_engine import AsyncEngine
from stallfree.engine.build import build_engine
from stallfree.engine.memory import Neighbours
from stallfree.engine.settings import EngineSettings
from stallfree.engine.trace import EngineTrace
from stallfree.errors import EngineError, StallfreeError
from stallfree.executor.line import Line, pickled
from stallfree.replicas.messages import (
    HEARTBEAT_S,
    Abort,
    Accepted,
    Events,
    Failed,
    Hello,
    Look,
    Looked,
    Measure,
    Measured,
    Output,
    Place,
    Ready,
    Record,
    Recorded,
    Refused,
    Report,
    StopRecording,
    Submit,
    Welcome,
)
from stallfree.replicas.outlook import ReplicaOutlook, engine_id
from stallfree.replicas.wire import connect, hang_up

SWITCH_INTERVAL_S = 0.0005  # as in a server: threads that hold the interpreter let go of it sooner

Request = Submit | Abort | Measure | Look | Record | StopRecording

logger = logging.getLogger(__name__)


class Replica:
    """Builds an engine, and runs it in threads until the front or the engine ends.

    Args:
        place: of the front.
        settings: of the engine.
        on_end: called in a thread, when the connection to the front has ended.
        num_here: replicas that share this machine.

    Attributes:
        engine: what runs the requests.
        outlook: what it predicts for the next.

    Raises:
        ConnectionRefusedError: the front has ended.
        OSError: the front cannot be reached.
        StallfreeError: the engine cannot be built; the front is told.
    """

    def __init__(
        self,
        place: Place,
        settings: EngineSettings,
        on_end: Callable[[], None] = lambda: None,
        num_here: int = 1,
    ) -> None:
        self._connection = connect(place)
        self._connection.send(Hello(socket.gethostname(), os.getpid()))
        neighbours = Neighbours(num_here, num_here if self._is_first() else 1)
        try:
            engine = build_engine(settings, show_progress=False, neighbours=neighbours)
        except BaseException as error:
            told = error if isinstance(error, StallfreeError) else EngineError(repr(error))
            with suppress(OSError):
                self._connection.send(Failed(told))
            raise
        self.engine = AsyncEngine(engine)
        self.outlook = ReplicaOutlook(engine)
        engine.observers.add(self.outlook)
        self._on_end = on_end
        self._outbox: list[Accepted | Refused | Output] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._trace: tuple[int, EngineTrace] | None = None  # the last, with its number
        self._sending: set[asyncio.Task[None]] = set()
        self._has_ended = False
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._serve()), name="stallfree-replica", daemon=True
        )
        self._thread.start()

    def _is_first(self) -> bool:
        """Whether all replicas start now, as the front says."""
        try:
            welcome = self._connection.recv()
        except EOFError as error:
            raise ConnectionResetError("the front has ended") from error
        assert isinstance(welcome, Welcome), f"{welcome} came first"
        return welcome.is_first

    @property
    def error(self) -> BaseException | None:
        """What ended the engine, if it died."""
        return self.engine.error

    def end(self) -> None:
        """Hang up, and drop what runs."""
        hang_up(self._connection)
        self._thread.join()

    async def _serve(self) -> None:
        """Take requests and send what becomes of them, until the front or the engine ends."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()

        def post(message: Request | None) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._take, message)

        self.engine.on_death = lambda _: post(None)
        self.engine.start()
        self._line = Line(self._connection, post)
        self._line.put(pickled(Ready(self.engine.facts)))
        while not self._has_ended:
            self._wake.clear()
            items, self._outbox = self._outbox, []
            events = Events(tuple(items), self._report(), self.engine.now())
            self._line.put(pickled(events))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), HEARTBEAT_S)
        hang_up(self._connection)
        self._line.close()
        self._on_end()
        await asyncio.to_thread(self.engine.stop)

    def _take(self, message: Request | None) -> None:
        match message:
            case None:
                self._has_ended = True
                self._wake.set()
            case Submit():
                task = asyncio.ensure_future(self._run(message))
                self._tasks[message.number] = task
                task.add_done_callback(lambda _: self._tasks.pop(message.number))
            case Abort():
                if message.number in self._tasks:
                    self._tasks[message.number].cancel()
            case Measure():
                self._line.put(pickled(Measured(self.engine.reading)))
            case Look(number):
                self._line.put(pickled(Looked(self.engine.view.sight(number))))
            case Record(number):
                self._trace = number, self.engine.trace()
            case StopRecording() if self._trace is not None:
                number, trace = self._trace
                trace.stop()
                task = asyncio.ensure_future(self._send(number, trace))
                self._sending.add(task)
                task.add_done_callback(self._sending.discard)

    async def _run(self, submit: Submit) -> None:
        number = submit.number
        deltas = self.engine.generate(
            engine_id(submit),
            submit.prompt_token_ids,
            submit.params,
            submit.targets,
            submit.cache_salt,
        )
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    if self.error is not None:  # it goes with the engine, and may run elsewhere
                        return
                    self._put(Accepted(number) if delta is None else Output(number, delta))
        except StallfreeError as error:
            if self.error is None:
                self._put(Refused(number, error))
        except Exception as error:
            logger.exception("request %d failed", number)
            self._put(Refused(number, EngineError(repr(error))))

    async def _send(self, number: int, trace: EngineTrace) -> None:
        """Send a trace that was stopped, in parts."""
        async for events in trace.events():
            self._line.put(pickled(Recorded(number, events)))
        self._line.put(pickled(Recorded(number, is_last=True, is_cut=trace.is_cut)))

    def _put(self, item: Accepted | Refused | Output) -> None:
        self._outbox.append(item)
        self._wake.set()

    def _report(self) -> Report:
        offer, last = self.outlook.now()
        engine = self.engine
        return Report(offer, last, engine.num_running, engine.num_waiting, engine.squeezed)

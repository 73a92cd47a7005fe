"""A replica as its front sees it: what it was sent, what came back, what it offers."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from stallfree.core.routing import Offer
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.targets import Targets
from stallfree.engine.facts import EngineFacts
from stallfree.engine.live_view import Sight
from stallfree.engine.outputs import Delta
from stallfree.engine.reading import EngineReading
from stallfree.engine.served import ReplicaState
from stallfree.errors import EngineStoppedError, StallfreeError
from stallfree.executor.line import Line, pickled
from stallfree.replicas.messages import (
    Abort,
    Accepted,
    Events,
    Hello,
    Look,
    Looked,
    Measure,
    Measured,
    Output,
    Record,
    Recorded,
    Refused,
    Report,
    StopRecording,
    Submit,
)
from stallfree.replicas.prefixes import Prefixes
from stallfree.replicas.questions import Questions
from stallfree.replicas.trace import ReplicaTrace
from stallfree.replicas.wire import hang_up


class _Stream:
    """Where what comes of one request goes."""

    def __init__(self, num_completions: int) -> None:
        self.open = set(range(num_completions))  # completions that have not ended
        self.items: asyncio.Queue[Delta | StallfreeError | None] = asyncio.Queue()


class Member:
    """One replica, from its first call until its connection ends.

    All but `heard_at` belongs to the thread of the front's event loop, once that runs.

    Args:
        connection: to it.
        hello: what it said first.
        index: its place among the replicas, which its successor takes.

    Attributes:
        facts: of its engine; None while it loads.
        report: the last; None before the first.
        heard_at: when something came, on this machine's monotonic clock.
    """

    def __init__(self, connection: Connection, hello: Hello, index: int) -> None:
        self.hello, self.index = hello, index
        self.facts: EngineFacts | None = None
        self.report: Report | None = None
        self.heard_at = time.monotonic()
        self._connection = connection
        self._line: Line | None = None
        self._numbers = itertools.count()
        self._streams: dict[int, _Stream] = {}
        self._unseen: dict[int, int] = {}  # tokens to read, of requests that no offer knows of
        self._prefixes: Prefixes | None = None
        self._reading: EngineReading | None = None  # the last that came
        self._readers: deque[asyncio.Future[None]] = deque()  # one for each that is to come
        self._looks: Questions[Sight] = Questions()
        self._trace_numbers = itertools.count()
        self._traces: dict[int, ReplicaTrace] = {}  # of which parts are to come
        self._clock_offset_s = math.inf  # ours less its own

    @property
    def name(self) -> str:
        """For people."""
        return f"replica {self.index} (process {self.hello.pid} on {self.hello.host})"

    @property
    def state(self) -> ReplicaState:
        """For those who watch."""
        report = self.report
        if report is None:
            return ReplicaState(self.index, False, 0, self.num_unseen, None)
        waiting = report.num_waiting + self.num_unseen
        wait_s = report.offer.wait_s
        return ReplicaState(self.index, True, report.num_running, waiting, wait_s)

    @property
    def num_unseen(self) -> int:
        """Requests that it was sent since its last offer."""
        return len(self._unseen)

    @property
    def is_busy(self) -> bool:
        """Whether a request that it was sent has not ended."""
        return bool(self._streams)

    def listen(self, on_message: Callable[[Any], None]) -> None:
        """Take what it says, in a thread; None is its end."""

        def hear(message: Any) -> None:
            self.heard_at = time.monotonic()
            on_message(message)

        self._line = Line(self._connection, hear)

    def is_loaded(self, facts: EngineFacts) -> None:
        """It has loaded the model."""
        self.facts = facts
        self._prefixes = Prefixes(facts.kv_cache_tokens // facts.block_size)

    def offer(self, blocks: Sequence[int]) -> Offer:
        """What it offers to a prompt of these blocks; it is ready."""
        assert self.report is not None, "whoever is ready makes an offer"
        offer = self.report.offer
        return replace(
            offer,
            num_before=sum(self._unseen.values()),
            num_requests=offer.num_requests + len(self._unseen),
            num_known=self._num_known(blocks),
        )

    async def run(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        targets: Targets,
        blocks: Sequence[int],
        *,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Delta | None, None]:
        """Send it a request, and give what comes back as `AsyncEngine.generate` does.

        Args:
            request_id: in the deltas.
            prompt_token_ids: what is to be read.
            params: see `AsyncEngine.generate`.
            targets: the same.
            blocks: of the prompt.
            cache_salt: see `AsyncEngine.generate`.

        Raises:
            ReplicaLostError: it was lost.
            StallfreeError: it refuses the request; before anything is yielded.
        """
        assert self._prefixes is not None, "it is ready"
        number = next(self._numbers)
        stream = self._streams[number] = _Stream(params.n)
        self._unseen[number] = max(1, len(prompt_token_ids) - self._num_known(blocks))
        self._prefixes.note(blocks)
        prompt = tuple(prompt_token_ids)
        self._tell(Submit(number, request_id, prompt, params, targets, cache_salt))
        num_open = params.n
        try:
            while num_open:
                item = await stream.items.get()
                if isinstance(item, StallfreeError):
                    num_open = 0
                    raise item
                if item is None:
                    yield None
                    continue
                num_open -= item.finish_reason is not None
                yield self._translated(item, request_id)
        finally:
            self._streams.pop(number, None)
            self._unseen.pop(number, None)
            if num_open:
                self._tell(Abort(number))

    async def reading(self, limit_s: float) -> EngineReading | None:
        """What it did and what it holds; that of before, if it does not answer within `limit_s`.

        None if it never did.
        """
        told = asyncio.get_running_loop().create_future()
        self._readers.append(told)
        self._tell(Measure())
        with suppress(TimeoutError):
            await asyncio.wait_for(told, limit_s)
        return self._reading

    async def look(self, number: int | None) -> Sight:
        """See `Watched`; by its own clock."""
        seen = self._looks.ask()
        self._tell(Look(number))
        return await seen

    def trace(self) -> ReplicaTrace:
        """Have it record a trace from now on; it records no other."""
        number = next(self._trace_numbers)
        self._tell(Record(number))
        trace = ReplicaTrace(lambda: self._tell(StopRecording()), self._clock_offset_s)
        self._traces[number] = trace
        return trace

    def take(self, message: Events | Measured | Looked | Recorded) -> None:
        """Take what it says once it is ready."""
        match message:
            case Measured(reading):
                self._reading = reading
                _release(self._readers.popleft())
            case Looked(sight):
                self._looks.take(sight)
            case Recorded(number):
                self._traces[number].take(message)
                if message.is_last:
                    del self._traces[number]
            case Events():
                self._take_events(message)

    def _take_events(self, events: Events) -> None:
        """Give each request its own; learn how the replica is."""
        offset_s = time.monotonic() - events.sent_at
        self._clock_offset_s = min(self._clock_offset_s, offset_s)
        for item in events.items:
            stream = self._streams.get(item.number)
            match item:
                case Refused(number, error):
                    self._unseen.pop(number, None)
                    if stream is not None:
                        stream.items.put_nowait(error)
                case Accepted() if stream is not None:
                    stream.items.put_nowait(None)
                case Output(_, delta) if stream is not None:
                    if delta.finish_reason is not None:
                        stream.open.discard(delta.index)
                    stream.items.put_nowait(delta)
        self.report = events.report
        for number in [each for each in self._unseen if each <= events.report.last]:
            del self._unseen[number]

    def fail(self, error: StallfreeError) -> None:
        """It is lost: end all its requests with an error, and let nobody wait for it."""
        for told in self._readers:
            _release(told)
        self._looks.fail(error)
        for trace in self._traces.values():
            trace.take(None)
        for stream in self._streams.values():
            stream.items.put_nowait(error)

    def abort_all(self, reason: str) -> None:
        """End all its requests as those of clients that have left."""
        for number, stream in self._streams.items():
            self._tell(Abort(number))
            for index in sorted(stream.open):
                error = EngineStoppedError(reason)
                delta = Delta(str(number), index, "", finish_reason="abort", error=error)
                stream.items.put_nowait(delta)

    def end(self) -> None:
        """Hang up: the replica ends with its connection."""
        hang_up(self._connection)
        if self._line is not None:
            self._line.close()

    def _tell(self, message: Submit | Abort | Measure | Look | Record | StopRecording) -> None:
        assert self._line is not None, "it is listened to"
        self._line.put(pickled(message))

    def _num_known(self, blocks: Sequence[int]) -> int:
        """Tokens of a prompt that it has read for another."""
        if self._prefixes is None or self.facts is None:
            return 0
        return self._prefixes.num_known(blocks) * self.facts.block_size

    def _translated(self, delta: Delta, request_id: str) -> Delta:
        """With the front's name of the request, and by the front's clock."""
        scheduled_at = delta.scheduled_at
        if scheduled_at is not None:
            scheduled_at += self._clock_offset_s
        return replace(delta, request_id=request_id, scheduled_at=scheduled_at)


def _release(waiting: asyncio.Future[None]) -> None:
    """Let whoever waits for it go on, if anybody still does."""
    if not waiting.done():
        waiting.set_result(None)

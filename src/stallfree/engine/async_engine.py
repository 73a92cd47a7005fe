"""The engine in a thread of its own, behind asynchronous streams.

Only that thread touches the engine; others post commands to its inbox, which it empties before
every iteration. So a long iteration never blocks an event loop, and an abort takes effect within
one iteration.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

from stallfree.core.budget import Squeezed
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.targets import DEFAULT_TARGETS, Targets
from stallfree.engine.engine import Engine
from stallfree.engine.facts import EngineFacts
from stallfree.engine.live_view import LiveView, Watched
from stallfree.engine.meter import Meter
from stallfree.engine.outputs import Delta
from stallfree.engine.reading import EngineReading, read
from stallfree.engine.served import ReplicaState
from stallfree.engine.streams import Stream, Streams
from stallfree.engine.tokenizer import Tokenizer
from stallfree.engine.trace import EngineTrace
from stallfree.engine.trace_recorder import TraceRecorder
from stallfree.errors import (
    EngineStoppedError,
    ExecutorError,
    InvalidRequestError,
    WorkersLostError,
)

logger = logging.getLogger(__name__)

_DRAIN_POLL_S = 0.02
_TEND_S = 1.0  # how soon it is noticed that an idle process of the model has ended


class AsyncEngine:
    """Runs an `Engine` for asynchronous callers: a `ServedEngine`.

    Args:
        engine: runs the requests, of nobody else.

    Attributes:
        engine: the engine; call nothing that changes it.
        view: what it did of late, and does.
        error: what ended the loop, if it died.
        on_death: called with `error`, from the engine's thread.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: BaseException | None = None
        self.on_death: Callable[[BaseException], None] | None = None
        self._meter, self._recorder = Meter(), TraceRecorder()
        engine.observers.add(self._meter)
        engine.observers.add(self._recorder)
        self.view = LiveView(engine)
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams = Streams()
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="stallfree-engine", daemon=True)

    @property
    def facts(self) -> EngineFacts:
        """What the engine was built with."""
        return self.engine.facts

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the model."""
        return self.engine.tokenizer

    @property
    def num_running(self) -> int:
        """Completions that hold KV blocks."""
        return len(self.engine.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Completions that wait for admission."""
        return len(self.engine.scheduler.waiting)

    @property
    def squeezed(self) -> Squeezed:
        """What reading prompts cost against the latency target so far."""
        return self.engine.scheduler.budget.squeezed

    @property
    def local(self) -> Engine:
        """The engine."""
        return self.engine

    @property
    def replicas(self) -> Sequence[ReplicaState]:
        """None: it is one engine."""
        return ()

    @property
    def is_ready(self) -> bool:
        """Whether what runs the model is there: not while lost workers are started anew."""
        return not self.engine.is_restarting

    @property
    def health(self) -> Mapping[str, object]:
        """Nothing beside the counts."""
        return {}

    def now(self) -> float:
        """The engine's clock, in seconds."""
        return self.engine.clock.now()

    @property
    def reading(self) -> EngineReading:
        """What it did and what it holds."""
        return read(self.engine, self._meter.counts)

    async def readings(self) -> Mapping[str, EngineReading]:
        """That alone."""
        return {"": self.reading}

    def trace(self) -> EngineTrace:
        """Record from now on; there is no recording under way."""
        return EngineTrace(self._recorder, self.now)

    def watch(self, place: int | None) -> Watched:
        """What the live page shows of the engine.

        Raises:
            InvalidRequestError: a `place` is asked for.
        """
        if place is not None:
            raise InvalidRequestError(f"there is no replica {place}: it is one engine", "replica")
        return self.view

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the iteration under way; what still runs is dropped."""
        self._draining = True
        self._inbox.put(self._request_stop)
        if self._thread.is_alive():
            self._thread.join()

    async def check(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        targets: Targets = DEFAULT_TARGETS,
    ) -> None:
        """Raise what `generate` would raise for a bad request, without running it."""
        self._check_accepting()
        self.engine.check(prompt_token_ids, params, targets)

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        targets: Targets = DEFAULT_TARGETS,
        cache_salt: str | None = None,
    ) -> AsyncGenerator[Delta | None, None]:
        """Run a request; closing the iterator aborts it within one iteration.

        Yields:
            None once it is accepted, then the deltas of its n completions as they come; each ends
            with a `finish_reason`.

        Raises:
            InvalidRequestError: the request is wrong; before anything is yielded.
            OverloadedError: too much waits; before anything is yielded.
            EngineStoppedError: the engine takes no more requests.
        """
        await self.check(prompt_token_ids, params, targets)
        stream = self._streams.open(request_id, params.n)
        add = partial(
            self.engine.add, request_id, prompt_token_ids, params, targets, cache_salt=cache_salt
        )
        self._inbox.put(partial(self._add, stream, add))
        num_open = params.n
        try:
            if self.error is not None:  # it died since the check: nobody reads the inbox
                raise self._death()
            while num_open:
                delta = await stream.get()
                num_open -= delta is not None and delta.finish_reason is not None
                yield delta
        finally:
            self._streams.close(request_id)
            if num_open:
                self._inbox.put(lambda: self.engine.abort(request_id))

    def keeping(self, request_ids: Iterable[str]) -> AbstractContextManager[None]:  # noqa: ARG002
        """Nothing: no request runs again here."""
        return nullcontext()

    async def recover(self) -> None:
        """Nothing is lost without this process."""

    async def drain(self, timeout_s: float) -> bool:
        """Take no new requests and wait for those that run.

        Returns:
            False if some had to be aborted because `timeout_s` passed.
        """
        self._draining = True
        deadline = time.monotonic() + timeout_s
        while self._streams and self.error is None:
            if time.monotonic() >= deadline:
                self._abort_all()
                return False
            await asyncio.sleep(_DRAIN_POLL_S)
        return True

    def _abort_all(self) -> None:
        for request_id in self._streams.request_ids:
            self._inbox.put(partial(self.engine.abort, request_id))
        self._streams.end_all("abort", EngineStoppedError("the server is shutting down"))

    def _check_accepting(self) -> None:
        if self.error is not None:
            raise self._death()
        if self._draining:
            raise EngineStoppedError("the server is shutting down and takes no new requests")

    def _death(self) -> EngineStoppedError:
        return EngineStoppedError(f"the engine has died: {self.error!r}")

    def _add(self, stream: Stream, add: Callable[[], None]) -> None:
        try:
            add()
        except Exception as error:  # one that is not expected is its client's alone, too
            stream.put(error)
        else:
            stream.put(None)

    def _request_stop(self) -> None:
        self._stopping = True

    def _run(self) -> None:
        """The engine's thread: commands, then a step, for ever."""
        try:
            while True:
                self._take_commands()
                if self._stopping:
                    self._streams.end_all("abort", EngineStoppedError("the engine was stopped"))
                    return
                for delta in self.engine.step():
                    self._streams.deliver(delta)
        except BaseException as error:
            if isinstance(error, WorkersLostError):  # its message says all
                logger.error("the engine has ended: %s", error)
            else:
                logger.exception("the engine has died")
            self.error = error
            self._streams.end_all("error", ExecutorError(f"the engine has died: {error!r}"))
            if self.on_death is not None:
                self.on_death(error)
        finally:
            self.engine.close()

    def _take_commands(self) -> None:
        """Carry out what was posted; with nothing to run, wait for something."""
        while not self.engine.has_requests:
            with suppress(queue.Empty):
                self._inbox.get(timeout=_TEND_S)()
                break
            self.engine.tend()
        while not self._inbox.empty():
            self._inbox.get_nowait()()

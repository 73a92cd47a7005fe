"""Replicas in threads of this process: real engines and connections, without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

from engine_fixtures import GREEDY
from server_fixtures import RunningServer, serve, wait_until

from stallfree import SamplingParams
from stallfree.core.batch import Batch
from stallfree.core.request import FinishReason, Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import Targets
from stallfree.engine.observer import IterationRecord
from stallfree.engine.outputs import Delta
from stallfree.engine.settings import EngineSettings
from stallfree.engine.tokenizer import load_tokenizer
from stallfree.errors import OverloadedError, StallfreeError
from stallfree.executor.output import Executor, ExecutorOutput
from stallfree.model.source import open_model
from stallfree.replicas.front import ReplicatedEngine
from stallfree.replicas.messages import Place
from stallfree.replicas.replica import Replica
from stallfree.replicas.roster import Roster

LONG = replace(GREEDY, max_tokens=1000)
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "alpha",
    "temperature": 0,
    "max_tokens": 400,
    "ignore_eos": True,
}


class Counter:
    """An observer that counts requests."""

    def __init__(self) -> None:
        self.num_added = 0

    def added(self, request: Request) -> None:
        self.num_added += 1

    def refused(self, targets: Targets, error: OverloadedError) -> None: ...

    def iterated(self, record: IterationRecord, scheduler: Scheduler) -> None: ...

    def ended(self, request: Request, reason: FinishReason, now: float) -> None: ...


class Held:
    """An executor whose iterations wait while it is held, or die."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.free = threading.Event()
        self.free.set()
        self.is_dead = False

    def execute(self, batch: Batch) -> ExecutorOutput:
        self.free.wait()
        if self.is_dead:
            raise SystemExit("it dies")
        return self._executor.execute(batch)


class ThreadFleet:
    """Starts replicas in threads; starts others when it is told to."""

    host = "127.0.0.1"
    error: StallfreeError | None = None

    def __init__(self, settings: EngineSettings, count: int = 2) -> None:
        self.settings, self.count = settings, count
        self.replicas: list[Replica] = []
        self.counters: list[Counter] = []
        self.held: list[Held] = []
        self.num_ended = 0

    def start(self, place: Place) -> None:
        self.place = place
        for _ in range(self.count):
            self.add()

    def add(self) -> None:
        replica = Replica(self.place, self.settings, self._ended, self.count)
        engine = replica.engine.engine
        self.counters.append(Counter())
        engine.observers.add(self.counters[-1])
        self.held.append(Held(engine.executor))
        engine.executor = self.held[-1]
        self.replicas.append(replica)

    def _ended(self) -> None:
        self.num_ended += 1

    def check_progress(self, num_called: int, seconds: float) -> None: ...

    def close(self) -> None:
        for held in self.held:
            held.free.set()
        for replica in self.replicas:
            replica.end()

    @property
    def served(self) -> list[int]:
        """How many requests each replica was given."""
        return [counter.num_added for counter in self.counters]


def make_front(fleet: ThreadFleet, timeout_s: float = 10.0) -> ReplicatedEngine:
    """A front of a fleet."""
    roster = Roster(fleet, fleet.count, timeout_s)
    assert fleet.settings.model is not None
    tokenizer = load_tokenizer(open_model(fleet.settings.model))
    return ReplicatedEngine(roster, fleet.settings, tokenizer)


@contextmanager
def amid_an_answer(
    settings: EngineSettings,
) -> Iterator[tuple[RunningServer, ThreadFleet, Callable[[], bool]]]:
    """A server whose one replica answers `BODY`; calling the last says whether all of it came."""
    fleet = ThreadFleet(settings, count=1)
    with (
        serve(make_front(fleet), served_model_name="tiny") as server,
        ThreadPoolExecutor(1) as pool,
    ):
        whole = server.post("/v1/completions", BODY).json()["choices"]
        asked = pool.submit(server.post, "/v1/completions", BODY)
        engine = fleet.replicas[0].engine.engine
        wait_until(lambda: any(each.num_output_tokens > 5 for each in engine.scheduler.running))
        yield server, fleet, lambda: asked.result(30).json()["choices"] == whole


@asynccontextmanager
async def running(fleet: ThreadFleet, timeout_s: float = 10.0) -> AsyncGenerator[ReplicatedEngine]:
    """A front that takes requests in this event loop."""
    front = make_front(fleet, timeout_s)
    front.start()
    try:
        yield front
    finally:
        await asyncio.to_thread(front.stop)


async def ask(
    front: ReplicatedEngine, name: str, prompt: Sequence[int], params: SamplingParams
) -> list[Delta]:
    """All deltas of a request."""
    return [each async for each in front.generate(name, prompt, params) if each is not None]


def tokens(deltas: Sequence[Delta], index: int = 0) -> tuple[int, ...]:
    """What one completion is."""
    return tuple(token for each in deltas if each.index == index for token in each.token_ids)

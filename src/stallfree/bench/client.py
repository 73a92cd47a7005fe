"""The load generator: a workload sent to a server in real time, and what came of it.

In an open loop each request is sent at its time, however many are under way; how late it was is in
its record. It runs in one thread: what else runs there shows in the times. At 475 tokens a second
over 32 streams it takes 24 % of a core, and gaps are off by 0.7 ms at P99 (2 cores of Zen 3,
`benchmarks/bench_overhead.py`).
"""

from __future__ import annotations

import asyncio
import gc
import json
import resource
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from random import SystemRandom

import httpx

from stallfree.bench.endpoint import Endpoint, prepare
from stallfree.bench.exchange import exchange
from stallfree.bench.progress import OnProgress, Progress
from stallfree.bench.prompts import Prompts, PromptSize
from stallfree.bench.records import Record, Results
from stallfree.bench.workload import Workload

PROGRESS_S = 0.25
GONE_AFTER_FAILURES = 10
GONE_AFTER_S = 5.0
MAX_PAUSE_S = 60.0
INTERRUPTED = "it was interrupted"
GONE = "the server could no longer be reached"


async def run_workload(
    endpoint: Endpoint,
    workload: Workload,
    on_progress: OnProgress | None = None,
    *,
    stop: asyncio.Event | None = None,
) -> Results:
    """Send a workload and wait for its end.

    It ends early if `stop` is set, or if for some seconds, or for some requests in a row, nothing
    could be reached. The records so far are kept then, `is_complete` is False, and the fact
    `ended_early` says why.

    Args:
        endpoint: where to; what is not known of it is found out first, as by `prepare`.
        workload: what to send.
        on_progress: called a few times a second, and at the end.
        stop: ends the run when it is set.

    Raises:
        EndpointError: before anything is sent: the server cannot be measured.
    """
    ready = endpoint if endpoint.size is not None else await prepare(endpoint)
    assert ready.size is not None
    async with ready.open() as http:
        return await _Run(ready, ready.size, workload, http).results(on_progress, stop)


class _Run:
    def __init__(
        self, endpoint: Endpoint, size: PromptSize, workload: Workload, http: httpx.AsyncClient
    ) -> None:
        self._endpoint = endpoint
        self._workload = workload
        self._http = http
        self._prompts = Prompts(size, SystemRandom().getrandbits(64))
        self._records: list[Record] = []
        self._open: dict[int, Record] = {}  # those under way, by number
        self._num_ended_tokens = 0  # of those that are not
        self._gone = asyncio.Event()
        self._unreachable_s: list[float] = []  # when requests failed, since the last that did not
        self._num_answered = 0
        self._num_failed = 0
        self._started = 0.0

    async def results(self, on_progress: OnProgress | None, stop: asyncio.Event | None) -> Results:
        _allow_connections()
        began = datetime.now(UTC)
        stopped = stop or asyncio.Event()
        with _without_long_pauses():
            cpu_s = time.process_time()
            self._started = time.perf_counter()
            drive = self._open_loop() if self._workload.clients is None else self._closed_loop()
            await self._until_end(drive, stopped, on_progress)
            end_s = self._now()
            cpu_s = time.process_time() - cpu_s
        if on_progress is not None:
            on_progress(self._progress())
        is_complete = self._num_answered + self._num_failed == len(self._workload.arrivals)
        why = GONE if self._gone.is_set() else INTERRUPTED
        facts = self._facts(began) | ({} if is_complete else {"ended_early": why})
        return Results(self._workload, self._records, end_s, cpu_s, facts, is_complete)

    async def _until_end(
        self,
        drive: Coroutine[None, None, None],
        stopped: asyncio.Event,
        on_progress: OnProgress | None,
    ) -> None:
        """Wait until everything is done, or there is a reason not to."""
        driver = asyncio.create_task(drive)
        ends = [asyncio.create_task(event.wait()) for event in (stopped, self._gone)]
        others = [] if on_progress is None else [asyncio.create_task(self._tell(on_progress))]
        try:
            await asyncio.wait([driver, *ends], return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = [driver, *ends, *others]
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _open_loop(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number, arrival in enumerate(self._workload.arrivals):
                body = self._body(number)  # made ahead, so that it does not delay the sending
                await asyncio.sleep(max(0.0, arrival.at_s - self._now()))
                group.create_task(self._send(number, body))

    async def _closed_loop(self) -> None:
        numbers = iter(range(len(self._workload.arrivals)))

        async def client() -> None:
            for number in numbers:
                retry_after_s = await self._send(number, self._body(number))
                if retry_after_s is not None:
                    await asyncio.sleep(min(retry_after_s, MAX_PAUSE_S))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._workload.clients or 1, len(self._workload.arrivals))):
                group.create_task(client())

    def _body(self, number: int) -> bytes:
        arrival = self._workload.arrivals[number]
        return self._endpoint.body(self._prompts.text(number, arrival), arrival.output_tokens)

    async def _send(self, number: int, body: bytes) -> float | None:
        record = Record(self._workload.arrivals[number])
        self._records.append(record)
        self._open[number] = record
        retry_after_s = await exchange(self._http, self._endpoint, body, record, self._now)
        del self._open[number]
        self._num_ended_tokens += len(record.token_s)
        if record.failure is None:
            self._num_answered += 1
        else:
            self._num_failed += 1
        self._watch(record)
        return retry_after_s

    def _watch(self, record: Record) -> None:
        """Notice that the server is gone; one that broke off has not answered either."""
        kind = None if record.failure is None else record.failure.kind
        if kind == "unreachable":
            self._unreachable_s.append(self._now())
            lasted_s = self._unreachable_s[-1] - self._unreachable_s[0]
            if len(self._unreachable_s) >= GONE_AFTER_FAILURES or lasted_s >= GONE_AFTER_S:
                since_s = self._unreachable_s[0]
                if not any(each.token_s and each.token_s[-1] > since_s for each in self._records):
                    self._gone.set()
        elif kind != "broken":
            self._unreachable_s.clear()

    async def _tell(self, on_progress: OnProgress) -> None:
        while True:
            on_progress(self._progress())
            await asyncio.sleep(PROGRESS_S)

    def _progress(self) -> Progress:
        num_open_tokens = sum(len(record.token_s) for record in self._open.values())
        return Progress(
            elapsed_s=self._now(),
            num_planned=len(self._workload.arrivals),
            num_sent=len(self._records),
            num_answered=self._num_answered,
            num_failed=self._num_failed,
            num_tokens=self._num_ended_tokens + num_open_tokens,
        )

    def _now(self) -> float:
        return round(time.perf_counter() - self._started, 6)

    def _facts(self, began: datetime) -> dict[str, object]:
        size = self._endpoint.size
        facts: dict[str, object] = {
            "endpoint": self._endpoint.base_url,
            "model": self._endpoint.model,
            "api": self._endpoint.api,
            "began": began.isoformat(timespec="seconds"),
        }
        if size is not None and size.is_measured:
            facts["tokens_per_word"] = round(size.tokens_per_word, 4)
        if self._endpoint.extra_body:
            facts["extra_body"] = json.dumps(self._endpoint.extra_body)
        return facts


@contextmanager
def _without_long_pauses() -> Iterator[None]:
    """Keep the garbage collector from looking through what was there before the run."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _allow_connections() -> None:
    """Let this process have as many files open as it may: each request is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

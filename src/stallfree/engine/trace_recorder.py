"""A trace of iterations and requests, for as long as somebody asks for one.

One group of rows has the iterations, a row for each batch in flight; the other has a row for each
request: when it waited, when its prompt was read, when it was answered. Times are those of the
monotonic clock, as in a stage log's trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from stallfree.core.request import FinishReason, Request, RequestState
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import Targets
from stallfree.engine.observer import IterationRecord
from stallfree.errors import OverloadedError
from stallfree.executor.trace_event import bar, group_name, row_name

MAX_ENTRIES = 50_000  # bars and rows of a recording, some 30 MB; what comes later is left out
GROUPS = ITERATIONS, REQUESTS = 0, 1  # of rows


@dataclass(slots=True)
class _Row:
    """A request: what it does, since when, and when an iteration held it last."""

    number: int
    name: str
    num_preemptions: int
    phase: str | None  # None: it was under way before, and what it did is seen when it next runs
    since_s: float
    ran_until_s: float


@dataclass(frozen=True, slots=True)
class _Bar:
    group: int
    row: int
    name: str
    start_s: float
    end_s: float
    args: dict[str, object]


class Recording:
    """What happened from one moment to another.

    The engine's thread adds to it. Another may read it once it is no longer added to.

    Args:
        started_s: by the engine's clock.
        max_entries: most that it holds.

    Attributes:
        is_cut: whether something was left out.
    """

    def __init__(self, started_s: float, max_entries: int = MAX_ENTRIES) -> None:
        self.started_s = started_s
        self.is_cut = False
        self._max_entries = max_entries
        self._num_iterations = 0
        self._bars: list[_Bar] = []
        self._rows: dict[str, _Row] = {}  # of requests that have not ended, by id
        self._ended: list[_Row] = []

    def events(self, now: float) -> Iterator[dict[str, object]]:
        """Chrome's trace events of all that was recorded; what still goes on ends at `now`."""
        yield group_name(ITERATIONS, "iterations")
        yield group_name(REQUESTS, "requests")
        open_rows = list(self._rows.values())
        for row in chain(self._ended, open_rows):
            yield row_name(REQUESTS, row.number, row.name)
        under_way = [self._bar_of(row, now, {}) for row in open_rows]
        for each in chain(self._bars, under_way):
            if each is not None:
                yield bar(
                    each.name, each.row, each.start_s, each.end_s, each.args, group=each.group
                )

    def added(self, request: Request) -> None:
        """A request arrived, or is found waiting or running."""
        if self._is_full():
            return
        since_s = max(request.arrived_at, self.started_s)
        first_s = request.first_scheduled_at
        is_waiting = request.state is RequestState.WAITING
        self._rows[request.request_id] = _Row(
            number=len(self._rows) + len(self._ended),
            name=f"{request.request_id}: {request.targets.tier}, {request.num_prompt_tokens} "
            "tokens of prompt",
            num_preemptions=request.num_preemptions,
            phase="waiting" if is_waiting or first_s is None or first_s >= since_s else None,
            since_s=since_s,
            ran_until_s=since_s,
        )

    def iterated(self, record: IterationRecord, scheduler: Scheduler) -> None:
        """An iteration came back."""
        if self._num_iterations == 0:
            for request in chain(scheduler.waiting, scheduler.running):
                if request.request_id not in self._rows:
                    self.added(request)
        self._note_iteration(record, self._num_iterations % scheduler.config.num_stages)
        self._num_iterations += 1
        for chunk in record.batch.chunks:
            request = chunk.request
            row = self._rows.get(request.request_id)
            if row is None:  # it ended in flight, or is left out
                continue
            if request.num_preemptions != row.num_preemptions:
                row.num_preemptions = request.num_preemptions
                self._enter(row, "waiting", row.ran_until_s)
            self._enter(row, "decode" if chunk.is_decode else "prefill", record.started_s)
            if chunk.samples:
                self._enter(row, "decode", record.ended_s)
            row.ran_until_s = record.ended_s

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        """A request ended."""
        row = self._rows.pop(request.request_id, None)
        if row is not None:
            self._ended.append(row)
            self._add(self._bar_of(row, now, {"ended": reason.value}))

    def _note_iteration(self, record: IterationRecord, row: int) -> None:
        batch = record.batch
        prompt_tokens = batch.num_tokens - batch.num_decodes
        predicted_s = record.predicted_s
        args: dict[str, object] = {
            "decodes": batch.num_decodes,
            "prefill_tokens": prompt_tokens,
            "prefills": len(batch.chunks) - batch.num_decodes,
            "budget": batch.token_limit,
            "predicted_ms": None if predicted_s is None else round(1000 * predicted_s, 3),
            "actual_ms": round(1000 * record.seconds, 3),
            "failed": record.is_failed,
        }
        name = f"{batch.num_decodes} decodes, {prompt_tokens} tokens of prompts"
        self._add(_Bar(ITERATIONS, row, name, record.started_s, record.ended_s, args))

    def _enter(self, row: _Row, phase: str, at_s: float) -> None:
        if row.phase == phase:
            return
        at_s = max(at_s, row.since_s)
        if row.phase is None:  # it has done that since before the recording
            row.phase = phase
            return
        self._add(self._bar_of(row, at_s, {}))
        row.phase, row.since_s = phase, at_s

    def _bar_of(self, row: _Row, until_s: float, args: dict[str, object]) -> _Bar | None:
        if row.phase is None or until_s <= row.since_s:
            return None
        return _Bar(REQUESTS, row.number, row.phase, row.since_s, until_s, args)

    def _add(self, each: _Bar | None) -> None:
        if each is not None and not self._is_full():
            self._bars.append(each)

    def _is_full(self) -> bool:
        if len(self._bars) + len(self._rows) + len(self._ended) < self._max_entries:
            return False
        self.is_cut = True
        return True


class TraceRecorder:
    """An `Observer` that adds to a recording while there is one."""

    def __init__(self) -> None:
        self._recording: Recording | None = None

    @property
    def is_recording(self) -> bool:
        """Whether somebody wants to know."""
        return self._recording is not None

    def start(self, now: float) -> Recording:
        """Begin a recording; there must be none. From any thread."""
        assert self._recording is None, "one recording at a time"
        self._recording = Recording(now)
        return self._recording

    def stop(self) -> None:
        """Add nothing more, but what is being added at this moment. From any thread."""
        self._recording = None

    def added(self, request: Request) -> None:
        """See `Observer`."""
        if (recording := self._recording) is not None:
            recording.added(request)

    def refused(self, targets: Targets, error: OverloadedError) -> None:
        """See `Observer`."""

    def iterated(self, record: IterationRecord, scheduler: Scheduler) -> None:
        """See `Observer`."""
        if (recording := self._recording) is not None:
            recording.iterated(record, scheduler)

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        """See `Observer`."""
        if (recording := self._recording) is not None:
            recording.ended(request, reason, now)

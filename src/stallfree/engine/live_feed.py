"""What the live page is told: every request and iteration of late, as small records.

The engine's thread writes them, whether or not anyone watches: some microseconds an iteration, and
one number for each token. Prompts and outputs are never in them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from stallfree.core.request import FinishReason, Request, RequestState
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import RANKS, Targets
from stallfree.engine.observer import IterationRecord
from stallfree.errors import OverloadedError

MAX_RECORDS = 2048  # kept for those who come later, or read slowly: a minute or more of iterations

Record = dict[str, Any]


class History:
    """The latest records, each with a number that counts up. One thread writes, any others read.

    Args:
        size: records kept at most.
    """

    def __init__(self, size: int) -> None:
        self._slots: list[Record] = [{}] * size
        self._count = 0

    @property
    def count(self) -> int:
        """The number of the next record."""
        return self._count

    @property
    def first(self) -> int:
        """The number of the oldest record; one slot may be being written."""
        return max(0, self._count - len(self._slots) + 1)

    def append(self, record: Record) -> None:
        """Add a record, and forget the oldest."""
        self._slots[self._count % len(self._slots)] = record
        self._count += 1

    def since(self, number: int, most: int) -> tuple[int, list[Record]]:
        """Records from `number` on, at most so many, and the number of the first of them.

        It is greater than `number` if those before were forgotten.
        """
        start = max(number, self.first)
        stop = min(self._count, start + most)
        records = [self._slots[each % len(self._slots)] for each in range(start, stop)]
        forgotten = min(max(0, self.first - start), len(records))  # while they were read
        return start + forgotten, records[forgotten:]


class LiveFeed:
    """An `Observer` that turns what it is told into records. Times are of the engine's clock.

    Args:
        now: that clock.

    Attributes:
        history: the records.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self.history = History(MAX_RECORDS)
        self._now = now
        self._next_number = itertools.count(1)
        self._numbers: dict[str, int] = {}  # by the scheduler's request id; shorter in records
        self._live: dict[int, Request] = {}
        self._num_preemptions = 0

    def live(self) -> list[Record]:
        """All requests that have not ended. Safe to call from any thread.

        What it says of one may be an iteration ahead of the records.
        """
        return [
            {
                **_facts(number, request),
                "state": request.state.value,
                "computed": request.num_computed_tokens,
                "outputs": request.num_output_tokens,
            }
            for number, request in list(self._live.items())
        ]

    def added(self, request: Request) -> None:
        """See `Observer`."""
        number = next(self._next_number)
        self._numbers[request.request_id] = number
        self._live[number] = request
        self.history.append({"kind": "added", **_facts(number, request)})

    def refused(self, targets: Targets, error: OverloadedError) -> None:  # noqa: ARG002 - no text
        """See `Observer`."""
        self.history.append({"kind": "refused", "at": self._now(), "tier": targets.tier})

    def iterated(self, record: IterationRecord, scheduler: Scheduler) -> None:
        """See `Observer`."""
        self._note_preemptions(record, scheduler)
        numbers = self._numbers
        decodes: list[int] = []
        prefills: list[tuple[int, int, int, bool]] = []
        for chunk in record.batch.chunks:
            number = numbers.get(chunk.request.request_id)
            if number is None:  # it ended while it was in flight
                continue
            if chunk.is_decode:
                decodes.append(number)
            else:
                prefills.append((number, chunk.start, chunk.num_tokens, chunk.samples))
        self.history.append(
            {
                "kind": "iteration",
                "start": record.started_s,
                "end": record.ended_s,
                "predicted": record.predicted_s,
                "budget": record.batch.token_limit,
                "failed": record.is_failed,
                "decodes": decodes,
                "prefills": prefills,
                **load_of(scheduler),
            }
        )

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        """See `Observer`."""
        number = self._numbers.pop(request.request_id)
        del self._live[number]
        self.history.append(
            {
                "kind": "ended",
                "request": number,
                "at": now,
                "reason": reason.value,
                "outputs": request.num_output_tokens,
            }
        )

    def _note_preemptions(self, record: IterationRecord, scheduler: Scheduler) -> None:
        total = scheduler.preemptions.total()
        if total == self._num_preemptions:
            return
        self._num_preemptions = total
        waiting = [
            number
            for number, request in self._live.items()
            if request.num_preemptions and request.state is RequestState.WAITING
        ]
        self.history.append({"kind": "preempted", "at": record.started_s, "requests": waiting})


def load_of(scheduler: Scheduler) -> Record:
    """How much runs and waits, and the KV blocks that are left. Safe to call from any thread."""
    up_to = [scheduler.waiting.num_requests(rank) for rank in RANKS.values()]
    return {
        "running": len(scheduler.running),
        "waiting": [up_to[0], up_to[1] - up_to[0], up_to[2] - up_to[1]],
        "free_blocks": scheduler.pool.num_free,
    }


def _facts(number: int, request: Request) -> Record:
    """What does not change of a request."""
    targets = request.targets
    return {
        "request": number,
        "id": request.request_id,
        "tier": targets.tier,
        "at": request.arrived_at,
        "prompt": request.num_prompt_tokens,
        "most_outputs": request.max_tokens,
        "tbt_s": targets.tbt_s,
        "ttft_s": targets.ttft_s,
    }

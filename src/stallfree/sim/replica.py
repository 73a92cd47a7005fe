"""One simulated copy of the model: the engine's loop and scheduler on a clock of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator

from stallfree.bench.prompts import OWN_WORDS
from stallfree.bench.records import Failure, Record
from stallfree.bench.workload import Arrival
from stallfree.core.admission import Admission
from stallfree.core.batch import Batch
from stallfree.core.pace import MeasuredPace
from stallfree.core.repeats import num_repeats, repeat
from stallfree.core.request import Request
from stallfree.core.routing import Offer, offer_of
from stallfree.core.sampling_params import SamplingParams
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import DEFAULT_TARGETS, Targets
from stallfree.engine.loop import Loop
from stallfree.errors import EngineError, InvalidRequestError, OverloadedError
from stallfree.sim.clock import SimulatedClock
from stallfree.sim.pipeline import SimulatedPipeline
from stallfree.sim.times import StageTimes

_PARAMS = SamplingParams(temperature=0.0, ignore_eos=True)


class Replica:
    """Runs requests, and notes in their records when their tokens came.

    Args:
        scheduler: with its pool and budget.
        times: of its pipeline.
        admission: who is refused.
        targets: of all requests.

    Attributes:
        num_iterations: how many were completed.
        num_preemptions: of all requests that have ended.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        times: StageTimes,
        admission: Admission | None = None,
        targets: Targets = DEFAULT_TARGETS,
    ) -> None:
        self.scheduler = scheduler
        self.clock = SimulatedClock()
        self.pipeline = SimulatedPipeline(times, self.clock)
        self.num_iterations = 0
        self.num_preemptions = 0
        self._loop = Loop(scheduler, self.pipeline, self.clock)
        self._records: dict[str, tuple[Request, Record]] = {}
        self._admission = admission or Admission()
        self._targets = targets
        self._num_added = 0
        self._pace = MeasuredPace(scheduler.budget)

    @property
    def next_at(self) -> float:
        """When its next iteration ends; infinity if it idles."""
        return self.pipeline.next_done_at

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._records)

    @property
    def tokens_left(self) -> int:
        """Tokens that are still to be read or made for them."""
        return sum(
            request.num_prompt_tokens + request.max_tokens - request.num_computed_tokens
            for request, _ in self._records.values()
        )

    def offer(self, at_s: float) -> Offer:
        """What it predicts for a request that arrives at a time not before the last."""
        self.clock.advance_to(at_s)
        return offer_of(self.scheduler, self._pace, at_s)

    def add(self, record: Record, at_s: float) -> bool:
        """Take a request that arrives at a time not before the last; False if it is refused."""
        self.clock.advance_to(at_s)
        arrival = record.arrival
        self._num_added += 1
        request = Request(
            str(self._num_added),
            self._prompt(arrival),
            _PARAMS,
            max_tokens=arrival.output_tokens,
            arrived_at=at_s,
            targets=self._targets,
        )
        record.sent_s = at_s
        record.prompt_tokens, record.output_tokens = arrival.prompt_tokens, 0
        try:
            self._admission.check(request, 1, self.scheduler)
            self.scheduler.add(request)
        except (InvalidRequestError, OverloadedError) as error:
            kind = "refused" if isinstance(error, OverloadedError) else "rejected"
            record.failure, record.end_s = Failure(kind, str(error)), at_s
            return False
        self._records[request.request_id] = request, record
        self.dispatch()
        return True

    def _prompt(self, arrival: Arrival) -> tuple[int, ...]:
        """Tokens; only with prefix caching does anybody look at them.

        Those that are shared, which are as many as in `bench.prompts`, are alike for one prefix.
        """
        count = arrival.prompt_tokens
        if not self.scheduler.config.prefix_caching:
            return (0,) * count
        num_shared = 0
        if arrival.prefix_id is not None:
            num_shared = count - min(OWN_WORDS, (count + 1) // 2)
            if arrival.prefix_tokens is not None:
                num_shared = min(arrival.prefix_tokens, count - 1)
        shared, own = 2 * (arrival.prefix_id or 0), 2 * self._num_added + 1
        return (shared,) * num_shared + (own,) * (count - num_shared)

    def dispatch(self) -> None:
        """Submit as many batches as there is room and work for.

        Raises:
            EngineError: requests wait but none can run, which is a bug.
        """
        while self._loop.num_in_flight < self.pipeline.num_stages:
            if not self._loop.dispatch():
                self.pipeline.starve()
                if self._records and not self._loop.num_in_flight:
                    raise EngineError("no request can be scheduled: the scheduler is stuck")
                return

    def advance(self, until_s: float = -math.inf) -> list[Record]:
        """Jump to the end of the iteration under way; the requests that ended with it.

        If nothing can arrive before `until_s`, iterations that end before then and hold the same
        decodes are run at once, which changes nothing but the time that the simulation takes.
        """
        iteration = self._loop.collect()
        if iteration.error is not None:
            raise iteration.error
        self._pace.observe(iteration.batch, self._loop.observe(iteration))
        self.num_iterations += 1
        now, ended = self.clock.now(), []
        for chunk in iteration.batch.sampling:
            request = chunk.request
            record = self._records[request.request_id][1]
            record.token_s.append(now)
            if request.is_finished:
                ended.append(self._end(request, record, now))
        if not ended and self.pipeline.num_stages == 1:
            self._repeat(iteration.batch, until_s)
        self.dispatch()
        return ended

    def _repeat(self, batch: Batch, until_s: float) -> None:
        most = num_repeats(self.scheduler, batch)
        if most == 0:
            return
        at_s = self.clock.now()
        done = self.pipeline.repeat(batch, most, until_s)
        repeat(self.scheduler, batch, 0, len(done))
        self.num_iterations += len(done)
        ends = [end_s for _, end_s in done]
        for chunk in batch.chunks:
            self._records[chunk.request.request_id][1].token_s += ends
        for each, end_s in done:
            self.scheduler.budget.observe(each, end_s - at_s)
            at_s = end_s

    def _end(self, request: Request, record: Record, now: float) -> Record:
        record.end_s, record.output_tokens = now, request.num_output_tokens
        record.scheduled_s = request.first_scheduled_at
        self.num_preemptions += request.num_preemptions
        del self._records[request.request_id]
        return record

    def open_records(self) -> Iterator[Record]:
        """Records of requests that have not ended."""
        return (record for _, record in self._records.values())

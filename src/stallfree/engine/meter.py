"""Counts what an engine does: latencies, tokens, ends and refusals, by tier.

An `Observer`. Times are by the engine's clock, from the moment a request is added to the moment
an iteration's tokens are there; what HTTP takes is not in them.
"""

from __future__ import annotations

import math

from stallfree.core.batch import Batch
from stallfree.core.request import FinishReason, Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import RANKS, Targets
from stallfree.engine.histogram import Histogram
from stallfree.engine.observer import IterationRecord
from stallfree.errors import OverloadedError

_SHORT_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.0, 5.0, 10.0),
)
_LONG_S = (
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0, 1800.0),
)
_RATIOS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0, 3.0, 5.0)
_WHOLE = (FinishReason.STOP, FinishReason.LENGTH)


class TierCounts:
    """What is counted of the requests of one tier; histograms are in seconds.

    Attributes:
        delay_s: from arrival to the first iteration.
        ttft_s: from arrival to the first token.
        tbt_s: every gap from one token to the next.
        tpot_s: mean gap of each answer that came to its end.
        end_to_end_s: from arrival to the end, of such answers.
        num_stalls: gaps over the request's own target.
        num_refused: requests that were not accepted.
        num_ended: requests that ended, by reason.
    """

    __slots__ = (
        *("delay_s", "end_to_end_s", "num_ended", "num_refused", "num_stalls"),
        *("tbt_s", "tpot_s", "ttft_s"),
    )

    def __init__(self) -> None:
        self.delay_s = Histogram(_LONG_S)
        self.ttft_s = Histogram(_LONG_S)
        self.tbt_s = Histogram(_SHORT_S)
        self.tpot_s = Histogram(_SHORT_S)
        self.end_to_end_s = Histogram(_LONG_S)
        self.num_stalls = 0
        self.num_refused = 0
        self.num_ended = dict.fromkeys(FinishReason, 0)


class _Progress:
    """A request that has not ended.

    Attributes:
        tier: where it is counted.
        target_s: longest gap that is no stall.
        is_scheduled: whether an iteration held it.
        first_at: when its first token came.
        last_at: when its newest token came.
    """

    __slots__ = ("first_at", "is_scheduled", "last_at", "target_s", "tier")

    def __init__(self, tier: TierCounts, target_s: float | None) -> None:
        self.tier = tier
        self.target_s = math.inf if target_s is None else target_s
        self.is_scheduled = False
        self.first_at: float | None = None
        self.last_at = 0.0


class Counts:
    """What an engine did since it started: plain values, which another process can be sent.

    One thread counts. Others may read meanwhile; figures may be an iteration apart.

    Attributes:
        tiers: by tier.
        iteration_s: seconds of iterations that gave something.
        prediction_ratio: of them, actual time over predicted time, where one was predicted.
        num_failed_iterations: the others.
        num_prompt_tokens: tokens of prompts that ran; after a preemption they run again, the
            output so far among them.
        num_output_tokens: tokens that came.
        token_limit: the budget of the newest iteration, in tokens; None without one.
    """

    __slots__ = (
        *("iteration_s", "num_failed_iterations", "num_output_tokens", "num_prompt_tokens"),
        *("prediction_ratio", "tiers", "token_limit"),
    )

    def __init__(self) -> None:
        self.tiers = {name: TierCounts() for name in RANKS}
        self.iteration_s = Histogram(_SHORT_S)
        self.prediction_ratio = Histogram(_RATIOS)
        self.num_failed_iterations = 0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.token_limit: int | None = None


class Meter:
    """Counts what an engine does.

    Attributes:
        counts: since it started.
    """

    def __init__(self) -> None:
        self.counts = Counts()
        self._progress: dict[str, _Progress] = {}

    def added(self, request: Request) -> None:
        """See `Observer`."""
        targets = request.targets
        tier = self.counts.tiers[targets.tier]
        self._progress[request.request_id] = _Progress(tier, targets.tbt_s)

    def refused(self, targets: Targets, error: OverloadedError) -> None:  # noqa: ARG002
        """See `Observer`."""
        self.counts.tiers[targets.tier].num_refused += 1

    def iterated(self, record: IterationRecord, scheduler: Scheduler) -> None:  # noqa: ARG002
        """See `Observer`."""
        batch, counts = record.batch, self.counts
        if record.is_failed:
            counts.num_failed_iterations += 1
            return
        counts.iteration_s.add(record.seconds)
        if record.predicted_s:
            counts.prediction_ratio.add(record.seconds / record.predicted_s)
        counts.token_limit = batch.token_limit
        counts.num_prompt_tokens += batch.num_tokens - batch.num_decodes
        if batch.num_decodes < len(batch.chunks):
            self._note_scheduled(batch)
        self._note_tokens(batch, record.ended_s)

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        """See `Observer`."""
        progress = self._progress.pop(request.request_id, None)
        if progress is None:  # it was there before this meter
            return
        tier = progress.tier
        tier.num_ended[reason] += 1
        if reason not in _WHOLE or progress.first_at is None:
            return
        tier.end_to_end_s.add(now - request.arrived_at)
        num_gaps = request.num_output_tokens - 1
        if num_gaps:
            tier.tpot_s.add((progress.last_at - progress.first_at) / num_gaps)

    def _note_scheduled(self, batch: Batch) -> None:
        for chunk in batch.chunks:
            if chunk.is_decode:
                continue
            request = chunk.request
            progress = self._progress.get(request.request_id)
            if progress is None or progress.is_scheduled or request.first_scheduled_at is None:
                continue
            progress.is_scheduled = True
            progress.tier.delay_s.add(request.first_scheduled_at - request.arrived_at)

    def _note_tokens(self, batch: Batch, now: float) -> None:
        num_tokens = 0
        for chunk in batch.sampling:
            request = chunk.request
            progress = self._progress.get(request.request_id)
            if progress is None or request.finish_reason is FinishReason.ERROR:
                continue  # it ended in flight, or nothing could be sampled: there is no token
            num_tokens += 1
            if progress.first_at is None:
                progress.first_at = now
                progress.tier.ttft_s.add(now - request.arrived_at)
            else:
                gap_s = now - progress.last_at
                progress.tier.tbt_s.add(gap_s)
                if gap_s > progress.target_s:
                    progress.tier.num_stalls += 1
            progress.last_at = now
        self.counts.num_output_tokens += num_tokens

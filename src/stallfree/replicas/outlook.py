"""What a replica tells its front of the next request's wait, as its own scheduler predicts it."""

from __future__ import annotations

from dataclasses import replace

from stallfree.core.pace import MeasuredPace
from stallfree.core.request import FinishReason, Request
from stallfree.core.routing import Offer, offer_of
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import Targets
from stallfree.engine.engine import Engine
from stallfree.engine.observer import IterationRecord
from stallfree.errors import OverloadedError
from stallfree.replicas.messages import Submit

_EVERY_S = 0.02  # how often an offer is made


def engine_id(submit: Submit) -> str:
    """What the engine calls a request: its number, and its name for people."""
    return f"{submit.number} {submit.name}"


class ReplicaOutlook:
    """An `Observer` that makes offers in the engine's thread, between iterations.

    Args:
        engine: whose requests have ids by `engine_id`; its thread has not started.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._pace = MeasuredPace(engine.scheduler.budget)
        self._made_at = engine.clock.now()
        self._added = -1  # number of the last request
        self._latest = offer_of(engine.scheduler, self._pace, self._made_at), self._added

    def now(self) -> tuple[Offer, int]:
        """The latest offer, and the number of the last request that it knows of. In any thread."""
        offer, last = self._latest
        added = self._added
        if self._engine.has_requests:
            return offer, last
        return replace(offer, wait_s=0.0, num_requests=0), added

    def added(self, request: Request) -> None:
        """See `Observer`."""
        self._added = int(request.request_id.partition(" ")[0])

    def refused(self, targets: Targets, error: OverloadedError) -> None:
        """See `Observer`: the front is told of it otherwise."""

    def iterated(self, record: IterationRecord, scheduler: Scheduler) -> None:
        """Learn the pace, and make an offer."""
        self._pace.observe(record.batch, record.seconds)
        if record.ended_s - self._made_at >= _EVERY_S:
            self._made_at = record.ended_s
            self._latest = offer_of(scheduler, self._pace, record.ended_s), self._added

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        """See `Observer`: the next iteration shows it."""

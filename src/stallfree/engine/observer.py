"""What an engine tells those who watch it: metrics, traces, the live page.

They are called in the engine's thread, between iterations: whatever takes long is done elsewhere.
One that raises is dropped, and the engine goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from stallfree.core.batch import Batch
from stallfree.core.request import FinishReason, Request
from stallfree.core.scheduler import Scheduler
from stallfree.core.targets import Targets
from stallfree.errors import OverloadedError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class IterationRecord:
    """An iteration that came back, and was completed unless it failed.

    Attributes:
        batch: what ran; each request of `batch.sampling` has a new token, at `ended_s`.
        started_s: when it was scheduled, by the engine's clock.
        ended_s: when its tokens were there.
        predicted_s: what the budget predicted it to take, as likely too low as too high; None if
            the budget predicts nothing.
        is_failed: whether nothing came of it: its requests ended.
    """

    batch: Batch
    started_s: float
    ended_s: float
    predicted_s: float | None
    is_failed: bool

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended_s - self.started_s


class Observer(Protocol):
    """Told of everything that happens to requests. It reads what it is given, and changes nothing.

    A request is one completion: `n` of a prompt are as many. Each is added once and ends once.
    """

    def added(self, request: Request) -> None:
        """A request was accepted, at `request.arrived_at`."""
        ...

    def refused(self, targets: Targets, error: OverloadedError) -> None:
        """A request was not accepted, as too much waits."""
        ...

    def iterated(self, record: IterationRecord, scheduler: Scheduler) -> None:
        """An iteration came back. Told before the end of those requests that it ends."""
        ...

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        """A request ended; it may hold blocks until the batches in flight are through."""
        ...


class Observers:
    """All observers of an engine, told one after the other: an `Observer` itself."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []

    def add(self, observer: Observer) -> None:
        """Tell `observer` too from now on; before the engine's thread starts, or in it."""
        self._observers.append(observer)

    def added(self, request: Request) -> None:
        """See `Observer`."""
        self._tell(lambda each: each.added(request))

    def refused(self, targets: Targets, error: OverloadedError) -> None:
        """See `Observer`."""
        self._tell(lambda each: each.refused(targets, error))

    def iterated(self, record: IterationRecord, scheduler: Scheduler) -> None:
        """See `Observer`."""
        self._tell(lambda each: each.iterated(record, scheduler))

    def ended(self, request: Request, reason: FinishReason, now: float) -> None:
        """See `Observer`."""
        self._tell(lambda each: each.ended(request, reason, now))

    def _tell(self, event: Callable[[Observer], None]) -> None:
        for observer in list(self._observers):
            try:
                event(observer)
            except Exception:
                logger.exception("%s is told nothing any more", type(observer).__name__)
                self._observers.remove(observer)

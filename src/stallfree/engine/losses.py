"""When workers are lost: starting them anew, and which requests may be the cause of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

from stallfree.core.batch import Batch
from stallfree.errors import WorkersLostError
from stallfree.executor.output import WorkerPipeline

MOST_LOSSES = 3
_STARTS = 5  # attempts to start workers anew, as those may be lost too

logger = logging.getLogger(__name__)


def start_anew(workers: WorkerPipeline) -> None:
    """Start lost workers anew, and again if one is lost even while it starts.

    Raises:
        WorkersLostError: one was lost at each attempt.
    """
    for attempt in range(1, _STARTS + 1):
        try:
            workers.restart()
            return
        except WorkersLostError as error:
            if attempt == _STARTS:
                raise
            logger.error("the workers are started anew again: %s", error)


class Losses:
    """Counts how often each request was in flight at a loss, since it last got on."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def forget(self, batch: Batch) -> None:
        """A batch came back: its requests are not the cause."""
        for chunk in batch.chunks:
            self._counts.pop(chunk.request.request_id, None)

    def note(self, lost: Iterable[Batch]) -> list[str]:
        """Ids of the requests that were in flight in `MOST_LOSSES` losses, this one included.

        Of others than those in flight now nothing is kept: they were not in all of them.
        """
        ids = {chunk.request.request_id for batch in lost for chunk in batch.chunks}
        self._counts = Counter({own_id: self._counts[own_id] + 1 for own_id in ids})
        return sorted(own_id for own_id, count in self._counts.items() if count >= MOST_LOSSES)

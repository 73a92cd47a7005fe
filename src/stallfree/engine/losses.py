"""Which requests were in flight whenever the workers were lost: one of them may be the cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from stallfree.core.batch import Batch

MOST_LOSSES = 3


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

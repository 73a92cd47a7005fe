"""Decodes take turns where several batches are in flight: each batch takes its share of them.

Otherwise the first batch would hold all of them, and the others none.
"""

from __future__ import annotations

from collections.abc import Iterable

from stallfree.core.request import Request


class DecodeTurns:
    """Who goes next.

    Args:
        num_stages: batches that are in flight at once.
    """

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._left_out: dict[str, int] = {}  # decodes without a share of the last batch, in line

    def share(self, ready: list[Request], running: Iterable[Request]) -> list[Request]:
        """Those of `ready` without the decodes that are beyond this batch's share of all.

        Those that were left out before go first, in the order in which that befell them.

        Args:
            ready: requests that are not in flight, or may read on.
            running: all admitted requests.
        """
        if self._num_stages == 1:
            return ready
        decodes = [request for request in ready if request.is_decode]
        num_decodes = sum(request.num_output_tokens > 0 for request in running)
        share = -(-num_decodes // self._num_stages)
        line = self._left_out
        decodes.sort(key=lambda request: line.get(request.request_id, len(line)))
        self._left_out = {each.request_id: place for place, each in enumerate(decodes[share:])}
        return [request for request in ready if request.request_id not in self._left_out]

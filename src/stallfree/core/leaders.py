"""Those that compute what others wait for: a beginning that many share is computed once.

A request whose next block is being computed by another waits for that one and lets others pass.
Who that is, is derived anew in each iteration from those that run, so nobody is left to wait for
a request that has ended, failed or was preempted. Those that run wait for nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stallfree.core.blocks import BlockPool
from stallfree.core.prefix_cache import PrefixCache
from stallfree.core.request import Request, RequestState


def without_followers(
    line: Iterable[Request], cache: PrefixCache, pool: BlockPool, running: Iterable[Request]
) -> Iterator[Request]:
    """Those in a line that need not wait for another one to compute their next block.

    Whoever waits and is given out is taken to be admitted, as otherwise nobody after it is.

    Args:
        line: requests that run or wait, in order.
        cache: where blocks are found.
        pool: of the blocks.
        running: all admitted requests.
    """
    leaders: _Leaders | None = None
    for request in line:
        if request.state is RequestState.WAITING:
            leaders = leaders or _Leaders(cache, pool, running)
            if leaders.lead(request):
                continue
            leaders.join(request)
        yield request


class _Leaders:
    """Those that are computing blocks, or are about to."""

    def __init__(self, cache: PrefixCache, pool: BlockPool, running: Iterable[Request]) -> None:
        self._cache = cache
        self._pool = pool
        self._next: dict[tuple[int, bytes], int] = {}  # rank of whoever computes a block next
        for request in running:
            place = request.num_confirmed_tokens // pool.block_size
            if place < len(request.block_keys) and request.pending_finish is None:
                self._add(request, place)

    def join(self, request: Request) -> None:
        """A request that waits is about to be admitted."""
        place = len(self._cache.find(request))
        if place < len(request.block_keys):
            self._add(request, place)

    def _add(self, request: Request, place: int) -> None:
        key, rank = request.block_keys[place], request.targets.rank
        if self._pool.find(key) is None:
            self._next[place, key] = min(rank, self._next.get((place, key), rank))

    def lead(self, request: Request) -> bool:
        """Whether one that goes before `request`, or along with it, computes its next block."""
        if not self._next:
            return False
        usable = self._cache.num_usable(request)
        keys, rank = request.block_keys, request.targets.rank
        return any(
            place < usable and keys[place] == key and own <= rank
            for (place, key), own in self._next.items()
        )

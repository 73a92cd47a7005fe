"""Requests that wait for admission, and the order in which prompts are read.

Tiers go first by rank. Within a tier an order decides; or, with fairness, first the user who was
served least, and the order among the requests of one user.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator

from stallfree.core.fairness import TokenCounters
from stallfree.core.request import Request
from stallfree.core.targets import RANKS

_NO_TARGET_S = 60.0  # to the first token, of a request that has no target
_TOKENS_PER_S = 100.0  # that a second of waiting is worth in `srpf`

Entry = tuple[float, tuple[float, int], Request]  # the arrival is unique, so requests never compare


def _fcfs(request: Request) -> float:
    return request.arrived_at


def _edf(request: Request) -> float:
    target_s = request.targets.ttft_s
    return request.arrived_at + (_NO_TARGET_S if target_s is None else target_s)


def _srpf(request: Request) -> float:
    """Tokens to compute less what waiting is worth, but for a part that is the same for all."""
    num_tokens = request.num_remaining_tokens - request.num_found_tokens
    return num_tokens + _TOKENS_PER_S * request.arrived_at


# First come, first served; earliest deadline of the first token; shortest remaining prefill, where
# a second of waiting counts as 100 tokens, so that a prompt is overtaken for so long at most.
PREFILL_ORDERS: dict[str, Callable[[Request], float]] = {"fcfs": _fcfs, "edf": _edf, "srpf": _srpf}


class WaitingQueue:
    """Waiting requests in order.

    Args:
        order: a name in `PREFILL_ORDERS`.
        counters: of what each user got, for fairness; None: users do not matter.

    """

    def __init__(self, order: str = "fcfs", counters: TokenCounters | None = None) -> None:
        self._order = PREFILL_ORDERS[order]
        self._counters = counters
        self._queues: dict[tuple[int, str], list[Entry]] = {}  # by rank and user, sorted
        self._entries: dict[str, Entry] = {}
        self._num_requests = [0] * len(RANKS)
        self._num_tokens = [0] * len(RANKS)

    @property
    def has_flex(self) -> bool:
        """Whether one of them takes only what the others leave."""
        return self._num_requests[RANKS["flex"]] > 0

    def num_requests(self, rank: int) -> int:
        """How many of this rank and of lower ones wait."""
        return sum(self._num_requests[: rank + 1])

    def num_tokens(self, rank: int) -> int:
        """Tokens of theirs that are to be computed: what several share is counted once."""
        return sum(self._num_tokens[: rank + 1])

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Request]:
        yield from self.in_order((), True, is_flex=False)
        yield from self.in_order((), True, is_flex=True)

    def add(self, request: Request) -> None:
        """Let a request wait."""
        if self._counters is not None:
            self._counters.arrive(request.targets.rank, request.targets.user)
        entry = self._entry(request)
        self._entries[request.request_id] = entry
        insort(self._queues.setdefault(self._queue_of(request), []), entry)
        self._count(request, 1)

    def remove(self, request: Request) -> None:
        """Let it wait no longer.

        Raises:
            KeyError: it does not wait.
        """
        entry = self._entries.pop(request.request_id)
        place = self._queue_of(request)
        queue = self._queues[place]
        del queue[bisect_left(queue, entry)]
        if not queue:
            del self._queues[place]
        self._count(request, -1)
        if self._counters is not None:
            self._counters.leave(request.targets.rank, request.targets.user)

    def _count(self, request: Request, sign: int) -> None:
        rank = request.targets.rank
        self._num_requests[rank] += sign
        self._num_tokens[rank] += sign * (request.num_tokens - request.num_shared_tokens)

    def in_order(
        self, under_way: Iterable[Request], with_waiting: bool, *, is_flex: bool
    ) -> Iterator[Request]:
        """Prefills `under_way` and, if asked for, those that wait: of `flex` or of the other tiers.

        Lazily; the queue must not change meanwhile.
        """
        started: dict[tuple[int, str], list[Entry]] = {}
        for request in under_way:
            started.setdefault(self._queue_of(request), []).append(self._entry(request))
        for rank in RANKS.values():
            if (rank == RANKS["flex"]) != is_flex:
                continue
            users: dict[str, Iterator[Entry]] = {}
            if with_waiting:
                users = {
                    user: iter(queue) for (of, user), queue in self._queues.items() if of == rank
                }
            for (of, user), entries in started.items():
                if of == rank:
                    users[user] = heapq.merge(sorted(entries), users.get(user, ()))
            yield from self._taking_turns(users)

    def _taking_turns(self, users: dict[str, Iterator[Entry]]) -> Iterator[Request]:
        """The next of the user who got least so far; what is given out here counts at once."""
        counters = self._counters
        if counters is None or len(users) == 1:
            for entry in heapq.merge(*users.values()):
                yield entry[-1]
            return
        heads = [(counters[user], next(entries), user) for user, entries in users.items()]
        heapq.heapify(heads)
        while heads:
            got, entry, user = heads[0]
            yield entry[-1]
            following = next(users[user], None)
            if following is None:
                heapq.heappop(heads)
            else:
                got += entry[-1].num_unread_tokens
                heapq.heapreplace(heads, (got, following, user))

    def _queue_of(self, request: Request) -> tuple[int, str]:
        targets = request.targets
        return targets.rank, "" if self._counters is None else targets.user

    def _entry(self, request: Request) -> Entry:
        return self._order(request), request.arrival, request

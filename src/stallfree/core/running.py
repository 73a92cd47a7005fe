"""Requests that run: they hold KV blocks, grow by a block at a time, and give way to others.

Here requests come in from those that wait, and here they are sent back: the last in line where
another one needs a block for its next token, those of tier `flex` where a prompt of another tier
needs their room, and all of them when what they computed is lost. A request in flight stays.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from stallfree.core.memory import Memory
from stallfree.core.policies import POLICIES
from stallfree.core.request import Request, RequestState
from stallfree.core.scheduler_config import SchedulerConfig
from stallfree.core.waiting import WaitingQueue


class RunningRequests(Collection[Request]):
    """Admitted requests, by tier, then in order of arrival.

    Args:
        config: says how many there may be, and what is left for them to grow.
        memory: gives them their blocks.
        waiting: where they come from, and wait again.

    Attributes:
        preemptions: how many there were, by cause: `memory` (for the next token of others), `tier`
            (for a prompt that goes before it) or `lost` (with what ran it).
        swapped: those of them after which KV was kept in the swap space.
    """

    def __init__(self, config: SchedulerConfig, memory: Memory, waiting: WaitingQueue) -> None:
        self._config = config
        self._reserves = POLICIES[config.policy].reserves_context
        self._memory = memory
        self._pool = memory.pool
        self._waiting = waiting
        self._requests: list[Request] = []
        self._is_pressed = False  # one was preempted for memory, and requests have waited since
        self.preemptions: Counter[str] = Counter()
        self.swapped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def __contains__(self, request: object) -> bool:
        return request in self._requests

    @property
    def growth_blocks(self) -> int:
        """What admissions leave for each of them."""
        return self._config.growth_blocks if self._is_pressed else 0

    def may_run(self, request: Request) -> bool:
        """Whether one of them may be in the next batch."""
        if not request.in_flight:
            return True
        reads_on = request.num_remaining_tokens > 0 and request.pending_finish is None
        return reads_on and self._config.sequence_pipelining

    def admit(self, requests: Sequence[Request]) -> None:
        """Let requests that wait run, together."""
        self._memory.admit(requests)
        for request in requests:
            self._waiting.remove(request)
            request.num_found_tokens = request.num_shared_tokens = 0
            request.move_to(RequestState.RUNNING)
            insort(self._requests, request, key=lambda each: (each.targets.rank, each.arrival))

    def remove(self, request: Request) -> None:
        """Let one run no longer, as it ends."""
        self._requests.remove(request)

    def grow(self) -> list[Request]:
        """Give each the block of its next token, preempting the last of the last.

        Returns those that are ready to run, by tier and arrival.
        """
        self._is_pressed &= len(self._waiting) > 0
        ready = []
        block_size = self._pool.block_size
        for request in list(self._requests):
            if request.state is not RequestState.RUNNING or not self.may_run(request):
                continue
            if request.num_tokens <= len(request.block_table) * block_size:
                ready.append(request)
                continue
            missing = self._memory.missing_blocks(request)
            while missing > self._pool.num_free and request.state is RequestState.RUNNING:
                self.preempt(next(r for r in reversed(self._requests) if not r.in_flight), "memory")
                self._is_pressed = True
            if request.state is RequestState.RUNNING:
                request.block_table += self._pool.allocate(missing)
                ready.append(request)
        return ready

    def displace_flex(self, line: Iterator[Request]) -> bool:
        """Preempt `flex` requests, the latest first, while the first in `line` lacks their room.

        Args:
            line: of other tiers, in the order in which they are to be admitted, lazily.

        Returns:
            Whether any may have been.
        """
        if not self._requests or not self._requests[-1].is_flex or self._reserves:
            return False
        candidate = next(line, None)
        if candidate is None:
            return False
        victims = [r for r in reversed(self._requests) if r.is_flex and not r.in_flight]
        num_staying = len(self._requests) - len(victims)
        if self._memory.most_left(candidate, victims) < self._room_for(num_staying + 1):
            return False  # all of it would not be enough
        for victim in victims:
            num_running = len(self._requests)
            left = self._pool.num_free - self._memory.blocks_taken(candidate)
            has_room = left >= self._room_for(num_running + 1)
            if has_room and num_running < self._config.max_num_seqs:
                break
            self.preempt(victim, "tier")
        return True

    def _room_for(self, num_running: int) -> int:
        """Blocks that are left free when an admission makes it so many that run."""
        return self._memory.watermark_blocks + self.growth_blocks * num_running

    def preempt(self, request: Request, cause: str) -> None:
        """Take the blocks of one that is not in flight; it waits again."""
        self.preemptions[cause] += 1
        request.move_to(RequestState.WAITING)
        self.swapped[cause] += self._memory.preempt(request, keeps=cause != "lost")
        request.num_computed_tokens = request.num_confirmed_tokens = 0
        request.num_preemptions += 1
        self._requests.remove(request)
        self._memory.cache.remove(request)
        self._memory.cache.add(request)
        self._waiting.add(request)

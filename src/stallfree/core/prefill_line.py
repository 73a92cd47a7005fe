"""The line of prompts that an iteration may read: of requests that run, and of those that wait.

Not everyone in the order of `WaitingQueue` is in it. Who needs a block that another is about to
compute lets others pass (`leaders`). And KV is copied in for one request in an iteration, so that
an iteration does not copy for many; nobody overtakes the next one that needs it, as that one was
preempted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stallfree.core.leaders import without_followers
from stallfree.core.memory import Memory
from stallfree.core.policies import Candidate
from stallfree.core.request import Request, RequestState
from stallfree.core.running import RunningRequests
from stallfree.core.waiting import WaitingQueue


class PrefillLine:
    """The line of one iteration, lazily: nobody must join or leave while it is asked.

    Args:
        running: all admitted requests.
        waiting: those that may be admitted.
        memory: knows what their blocks hold.
    """

    def __init__(self, running: RunningRequests, waiting: WaitingQueue, memory: Memory) -> None:
        self._running = running
        self._waiting = waiting
        self._memory = memory
        self._returning: Request | None = None  # whose KV may be copied in

    def candidates(
        self, under_way: Sequence[Request], may_admit: bool, *, is_flex: bool
    ) -> Iterator[Candidate]:
        """For the policy: prefills under way and, if some may be admitted, those that wait.

        Args:
            under_way: requests that run and are ready to read on.
            may_admit: whether any that wait may be admitted.
            is_flex: of tier `flex`, or of the others.
        """
        for request in self.requests(under_way, may_admit, is_flex=is_flex):
            if request.state is RequestState.RUNNING:
                yield Candidate.of_running(request)
            else:
                num_found = self._memory.num_found(request)
                yield Candidate(
                    request,
                    start=num_found,
                    num_tokens=request.num_tokens - num_found,
                    num_blocks=self._memory.blocks_taken(request),
                    is_waiting=True,
                )

    def requests(
        self, under_way: Sequence[Request], may_admit: bool, *, is_flex: bool
    ) -> Iterator[Request]:
        """Those that may read on or be admitted, in order; see `candidates`."""
        own = [request for request in under_way if request.is_flex == is_flex]
        line = self._waiting.in_order(own, may_admit, is_flex=is_flex)
        memory = self._memory
        line = without_followers(line, memory.cache, memory.pool, self._running)
        return self._with_one_returning(line, own, is_flex) if memory.swaps else line

    def _with_one_returning(
        self, line: Iterator[Request], under_way: Sequence[Request], is_flex: bool
    ) -> Iterator[Request]:
        """Without those that wait from the second one on whose KV is copied in."""
        rest = list(under_way)
        for request in line:
            if request.state is RequestState.RUNNING:
                rest.remove(request)
            elif self._memory.is_swapped(request):
                if self._returning not in (None, request):
                    break
                self._returning = request
            yield request
        yield from self._waiting.in_order(rest, False, is_flex=is_flex)

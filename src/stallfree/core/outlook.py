"""What lies ahead: whose prompts are read before a new one, and how long answers will be.

Admission asks; nothing here changes a request. It counts tokens: how long they take is the
budget's to know.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from stallfree.core.request import Request, RequestState
from stallfree.core.waiting import WaitingQueue

_LAST_ANSWERS = 64  # whose length says how long answers are


class Outlook:
    """Looks ahead of whoever runs and waits at the moment.

    Args:
        running: the scheduler's own, which change under it.
        waiting: the scheduler's queue.
    """

    def __init__(self, running: Iterable[Request], waiting: WaitingQueue) -> None:
        self._running = running
        self._waiting = waiting
        self._answers: deque[int] = deque(maxlen=_LAST_ANSWERS)  # tokens of each

    def note_answer(self, num_tokens: int) -> None:
        """Learn how long an answer was that came to its end."""
        self._answers.append(num_tokens)

    def tokens_ahead(self, request: Request) -> tuple[int, int]:
        """Tokens that would be computed before a new request, and how many prompts of them wait."""
        num_tokens = num_waiting = 0
        prefills = [each for each in self._running if not each.is_decode]
        kinds = (False, True) if request.is_flex else (False,)
        for is_flex in kinds:
            own = [each for each in (*prefills, request) if each.is_flex == is_flex]
            for each in self._waiting.in_order(own, True, is_flex=is_flex):
                if each is request:
                    break
                num_tokens += each.num_unread_tokens
                num_waiting += each.state is RequestState.WAITING
        return num_tokens, num_waiting

    def tokens_left(self, request: Request) -> int:
        """How many tokens a request probably still gets, as long as the last answers were."""
        left = request.max_tokens - request.num_output_tokens
        if self._answers:
            typical = sum(self._answers) // len(self._answers)
            left = min(left, max(1, typical - request.num_output_tokens))
        return left

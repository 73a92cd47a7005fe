"""Questions to a replica, which answers them in their order."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

Answer = TypeVar("Answer")


class Questions(Generic[Answer]):
    """Those of one kind that are not answered yet."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[Answer]] = deque()
        self._failure: Exception | None = None

    def ask(self) -> asyncio.Future[Answer]:
        """Note one that is sent now; where its answer will be."""
        answer = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            answer.set_exception(self._failure)
        else:
            self._waiting.append(answer)
        return answer

    def take(self, answer: Answer) -> None:
        """The oldest is answered; nobody may wait for it any more."""
        asked = self._waiting.popleft()
        if not asked.done():
            asked.set_result(answer)

    def fail(self, error: Exception) -> None:
        """None of them will be answered, nor any that comes later."""
        self._failure = error
        for asked in self._waiting:
            if not asked.done():
                asked.set_exception(error)
        self._waiting.clear()

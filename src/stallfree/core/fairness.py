"""Fairness between users: a virtual counter of the tokens that each got (VTC, arXiv 2401.00588).

Whoever has the lowest counter among those who wait is served next. A user who comes back after a
pause starts at the lowest counter of those of the same rank who wait: what was not asked for is not
saved up. A user is whom a request names: nobody checks that.
"""

from __future__ import annotations

from collections import Counter

OUTPUT_WEIGHT = 2.0  # of a token of output against one of the prompt, as in the paper
_MOST_USERS = 10_000  # that are remembered


class TokenCounters:
    """What each user got, weighted."""

    def __init__(self) -> None:
        self._got: dict[str, float] = {}
        self._limit = _MOST_USERS
        self._waiting: dict[int, Counter[str]] = {}  # requests, by rank and user
        self._last_to_leave: dict[int, float] = {}

    def __getitem__(self, user: str) -> float:
        return self._got.get(user, 0.0)

    def arrive(self, rank: int, user: str) -> None:
        """A request of `user` waits now (algorithm 2 of the paper, lines 6 to 14)."""
        waiting = self._waiting.setdefault(rank, Counter())
        if user not in waiting:
            least = min(map(self.__getitem__, waiting), default=self._last_to_leave.get(rank, 0.0))
            self._got[user] = max(self[user], least)
        waiting[user] += 1

    def leave(self, rank: int, user: str) -> None:
        """A request of `user` waits no longer."""
        waiting = self._waiting[rank]
        waiting[user] -= 1
        if not waiting[user]:
            del waiting[user]
            self._last_to_leave[rank] = self[user]

    def charge(self, user: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Count tokens that were computed for `user`."""
        self._got[user] = self[user] + num_prompt_tokens + OUTPUT_WEIGHT * num_output_tokens
        if len(self._got) > self._limit:
            self._forget()

    def _forget(self) -> None:
        """Drop half of the users, those who got least, but for those who wait."""
        waiting = {name for users in self._waiting.values() for name in users}
        idle = sorted((got, name) for name, got in self._got.items() if name not in waiting)
        for _, name in idle[: len(idle) // 2]:
            del self._got[name]
        self._limit = len(self._got) + _MOST_USERS // 2

"""Fairness between users: a virtual counter of the tokens that each got (VTC, arXiv 2401.00588).

Whoever has the lowest counter among those who wait is served next. A user who comes back after a
pause starts at the lowest counter of those who wait: what was not asked for is not saved up.
"""

from __future__ import annotations

from collections import Counter

OUTPUT_WEIGHT = 2.0  # of a token of output against one of the prompt, as in the paper
_MOST_USERS = 10_000  # that are remembered


class TokenCounters:
    """What each user got, weighted."""

    def __init__(self) -> None:
        self._got: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        self._last_to_leave = 0.0

    def __getitem__(self, user: str) -> float:
        return self._got.get(user, 0.0)

    def arrive(self, user: str) -> None:
        """A request of `user` waits now (algorithm 2 of the paper, lines 6 to 14)."""
        if not self._waiting[user]:
            others = [self[other] for other in self._waiting if self._waiting[other]]
            self._got[user] = max(self[user], min(others, default=self._last_to_leave))
        self._waiting[user] += 1

    def leave(self, user: str) -> None:
        """A request of `user` waits no longer."""
        self._waiting[user] -= 1
        if not self._waiting[user]:
            del self._waiting[user]
            self._last_to_leave = self[user]

    def charge(self, user: str, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """Count tokens that were computed for `user`."""
        self._got[user] = self[user] + num_prompt_tokens + OUTPUT_WEIGHT * num_output_tokens
        if len(self._got) > _MOST_USERS:
            self._got = {name: self._got[name] for name in self._waiting if name in self._got}

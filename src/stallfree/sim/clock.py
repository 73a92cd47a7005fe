"""A clock that jumps."""

from __future__ import annotations


class SimulatedClock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Seconds since the start of the simulation."""
        return self._now

    def advance_to(self, at_s: float) -> None:
        """Jump to a later time; an earlier one changes nothing."""
        self._now = max(self._now, at_s)

"""How far a run is, live or simulated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is: requests planned, sent, answered and failed; tokens that came."""

    elapsed_s: float
    num_planned: int
    num_sent: int
    num_answered: int
    num_failed: int
    num_tokens: int

    @property
    def num_in_flight(self) -> int:
        """Requests whose end has not come."""
        return self.num_sent - self.num_answered - self.num_failed


OnProgress = Callable[[Progress], None]

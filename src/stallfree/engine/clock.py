"""Where the engine's time comes from."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time. A simulation brings one that jumps."""

    def now(self) -> float:
        """Seconds since some fixed moment; never decreases."""
        ...


class WallClock:
    """Real time."""

    def now(self) -> float:
        """Seconds on the system's monotonic clock."""
        return time.monotonic()

"""Why stages of a pipeline idle (Sarathi-Serve, section 3.3)."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stallfree.core.batch import Batch

_ALIKE = 1.02  # of each other, up to which amounts of work are alike


class Bubble(enum.Enum):
    """Why a stage idles between two batches."""

    PB1 = "prefills of different lengths"
    PB2 = "prefills beside batches without"
    PB3 = "batches that differ in their decodes"
    UNEVEN = "like batches, but stages that differ"
    NO_WORK = "nothing could be scheduled"


@dataclass(slots=True)
class StageUse:
    """What a stage did, in seconds.

    Attributes:
        busy_s: working.
        idle_s: between its first and its last batch, by reason.
    """

    busy_s: float = 0.0
    idle_s: dict[Bubble, float] = field(default_factory=lambda: dict.fromkeys(Bubble, 0.0))

    @property
    def idle_share(self) -> float:
        """Of the time in which there was work, the share that it idled."""
        idle_s = sum(self.idle_s.values()) - self.idle_s[Bubble.NO_WORK]
        return idle_s / (self.busy_s + idle_s) if self.busy_s else 0.0


class Work(NamedTuple):
    """What a batch asks of a stage: tokens of prompts, and any measure of all of it."""

    prefill_tokens: int
    amount: float

    @classmethod
    def of(cls, batch: Batch) -> Work:
        """Measured in tokens, and tokens that they attend to."""
        context = sum([chunk.stop for chunk in batch.chunks])
        return cls(batch.num_tokens - batch.num_decodes, batch.num_decodes + context / 1024)


def bubble_between(batches: Sequence[Work]) -> Bubble:
    """The reason of a gap that batches of one pipeline left, as they were not alike."""
    prefills = {work.prefill_tokens for work in batches}
    if len(prefills) > 1:
        return Bubble.PB2 if 0 in prefills else Bubble.PB1
    amounts = [work.amount for work in batches]
    return Bubble.PB3 if max(amounts) > _ALIKE * min(amounts) else Bubble.UNEVEN

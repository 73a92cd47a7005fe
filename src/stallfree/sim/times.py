"""How long a batch takes on what is simulated: the one thing that a simulation has to be told."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from stallfree.core.batch import Batch
from stallfree.core.step_time import BatchShape, StepTimeModel


class StageTimes(Protocol):
    """Seconds of a batch in each stage of a pipeline.

    Attributes:
        num_stages: how many there are; 1 for a model that is not split by layers.
    """

    @property
    def num_stages(self) -> int: ...

    def seconds(self, batch: Batch) -> Sequence[float]:
        """One for each stage, what it sends to the next included."""
        ...


class ProfiledTimes:
    """One stage whose times are those of a profile.

    Args:
        model: what was measured.
        seed: of the scatter; None for none. Each iteration takes its prediction times one that is
            drawn from those that were seen, so that a run has the machine's tail as well.
        sequence_s: what each request of an iteration takes beside what was profiled.
    """

    num_stages = 1

    def __init__(
        self, model: StepTimeModel, seed: int | None = None, sequence_s: float = 0.0
    ) -> None:
        self._model = model
        self._random = None if seed is None or not model.scatter else random.Random(seed)
        self._sequence_s = sequence_s

    def seconds(self, batch: Batch) -> Sequence[float]:
        """The prediction, scattered."""
        seconds = self._model.seconds(BatchShape.of(batch))
        if self._random is not None:
            seconds *= self._random.choice(self._model.scatter)
        return (seconds + self._sequence_s * len(batch.chunks),)

"""A pipeline of simulated stages: when each of them works on which batch, and why it idles."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from stallfree.core.batch import Batch, Chunk
from stallfree.executor.output import ExecutorOutput, Sample
from stallfree.sim.clock import SimulatedClock
from stallfree.sim.times import StageTimes

_TOKEN = Sample(0)


class Bubble(enum.Enum):
    """Why a stage idles between two batches (Sarathi-Serve, section 3.3)."""

    PB1 = "prefills of different lengths follow each other"
    PB2 = "a prefill follows a batch of decodes, or the other way round"
    PB3 = "two batches differ in their contexts alone"
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


class SimulatedPipeline:
    """A `Pipeline` whose batches take the times that they are told to, on a clock that jumps.

    Attributes:
        stages: what each stage did so far.
        num_batches: how many were submitted.
    """

    def __init__(self, times: StageTimes, clock: SimulatedClock) -> None:
        self.stages = [StageUse() for _ in range(times.num_stages)]
        self.num_batches = 0
        self._times = times
        self._clock = clock
        self._free_at = [0.0] * times.num_stages
        self._in_flight: deque[tuple[float, ExecutorOutput]] = deque()
        self._drawn: Sequence[float] | None = None  # times of the coming batch, if known
        self._last_prefill = 0  # tokens of the batch before
        self._was_starved = True  # since then, or ever

    @property
    def num_stages(self) -> int:
        """Most batches in flight."""
        return len(self._free_at)

    @property
    def next_done_at(self) -> float:
        """When the oldest batch in flight will be done; infinity if there is none."""
        return self._in_flight[0][0] if self._in_flight else float("inf")

    def starve(self) -> None:
        """Note that there was room for a batch, but none."""
        self._was_starved = True

    def submit(self, batch: Batch) -> None:
        """Send a batch through the stages, each as soon as the batch before has left it."""
        at_s = self._clock.now()
        prefill = batch.num_tokens - batch.num_decodes
        reason = self._reason(prefill)
        times, self._drawn = self._drawn or self._times.seconds(batch), None
        for index, seconds in enumerate(times):
            stage, free_at = self.stages[index], self._free_at[index]
            if at_s > free_at and stage.busy_s:
                stage.idle_s[reason] += at_s - free_at
            at_s = max(at_s, free_at) + seconds
            stage.busy_s += seconds
            self._free_at[index] = at_s
        self._last_prefill, self._was_starved = prefill, False
        self.num_batches += 1
        self._in_flight.append((at_s, ExecutorOutput((_TOKEN,) * len(batch.sampling))))

    def repeat(self, batch: Batch, most: int, until_s: float) -> list[tuple[Batch, float]]:
        """Run iterations like a batch of decodes that has just ended, as long as they end in time.

        For one stage. Returns each of them with the time of its end, at most `most`.
        """
        at_s, stage = self._clock.now(), self.stages[0]
        done: list[tuple[Batch, float]] = []
        while len(done) < most:
            batch = Batch(
                [Chunk(each.request, each.start + 1, 1, True, True) for each in batch.chunks]
            )
            seconds = self._times.seconds(batch)[0]
            if at_s + seconds >= until_s:
                self._drawn = [seconds]  # it is submitted next
                break
            stage.busy_s += seconds
            at_s += seconds
            done.append((batch, at_s))
        self.num_batches += len(done)
        self._free_at[0] = at_s
        self._clock.advance_to(at_s)
        return done

    def _reason(self, prefill: int) -> Bubble:
        """Why stages idle before a batch with so many tokens of prompts."""
        if self._was_starved:
            return Bubble.NO_WORK
        if prefill == self._last_prefill:
            return Bubble.PB3
        return Bubble.PB1 if prefill and self._last_prefill else Bubble.PB2

    def collect(self) -> ExecutorOutput:
        """Jump to the end of the oldest batch in flight."""
        done_at, output = self._in_flight.popleft()
        self._clock.advance_to(done_at)
        return output

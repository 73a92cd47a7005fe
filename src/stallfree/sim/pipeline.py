"""A pipeline of simulated stages: when each of them works on which batch, and why it idles."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from stallfree.core.batch import Batch, Chunk
from stallfree.core.bubbles import Bubble, StageUse, Work, bubble_between
from stallfree.executor.output import ExecutorOutput, Sample
from stallfree.sim.clock import SimulatedClock
from stallfree.sim.times import StageTimes

_TOKEN = Sample(0)


class SimulatedPipeline:
    """A `Pipeline` whose batches take the times that they are told to, on a clock that jumps.

    Attributes:
        stages: what each stage did so far.
    """

    def __init__(self, times: StageTimes, clock: SimulatedClock) -> None:
        self.stages = [StageUse() for _ in range(times.num_stages)]
        self._times = times
        self._clock = clock
        self._free_at = [0.0] * times.num_stages
        self._in_flight: deque[tuple[float, ExecutorOutput]] = deque()
        self._drawn: Sequence[float] | None = None  # times of the coming batch, if known
        # of the last batches, as many as can be in flight and the one that is coming: tokens of
        # prompts, and seconds in all stages
        self._last: deque[Work] = deque(maxlen=times.num_stages + 1)
        self._was_starved = True  # since the last batch, or ever

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
        times, self._drawn = self._drawn or self._times.seconds(batch), None
        self._last.append(Work(batch.num_tokens - batch.num_decodes, sum(times)))
        for index, seconds in enumerate(times):
            stage, free_at = self.stages[index], self._free_at[index]
            if at_s > free_at and stage.busy_s:
                stage.idle_s[self._reason(is_first=index == 0)] += at_s - free_at
            at_s = max(at_s, free_at) + seconds
            stage.busy_s += seconds
            self._free_at[index] = at_s
        self._was_starved = False
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
        self._free_at[0] = at_s
        self._clock.advance_to(at_s)
        return done

    def _reason(self, *, is_first: bool) -> Bubble:
        """Why a stage idles before the last batch.

        The first one waited for a place in the pipeline, so for the oldest of those in flight; any
        other for this batch to leave the stage before, while the batch before was done.
        """
        if self._was_starved:
            return Bubble.NO_WORK
        compared = list(self._last)[:-1] if is_first else list(self._last)[-2:]
        return bubble_between(compared)

    def collect(self) -> ExecutorOutput:
        """Jump to the end of the oldest batch in flight."""
        done_at, output = self._in_flight.popleft()
        self._clock.advance_to(done_at)
        return output

"""Token budgets: how many tokens an iteration may hold (Sarathi-Serve, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from stallfree.core.batch import Batch
from stallfree.core.load import Load
from stallfree.core.step_time import BatchShape, StepTimePredictor, chunk_context
from stallfree.core.token_costs import TokenCosts

_SHARE = 0.97  # of a target that an iteration may take: its tokens are still to be delivered
_ROUNDING = 1e-9
_IDLE_S = 0.5  # of an iteration that holds up no answer; arrivals and aborts wait for its end


class TokenBudget(Protocol):
    """Asked once in each iteration.

    Attributes:
        tile_tokens: what matrix kernels round rows up to. A prefill chunk that does not end its
            prompt is cut so that the iteration's tokens are a multiple of it ("tile
            quantization": 257 tokens may cost a third more than 256).
        squeezed: what reading prompts cost against the target.
    """

    @property
    def tile_tokens(self) -> int: ...

    @property
    def squeezed(self) -> Squeezed: ...

    def tokens(self, load: Load) -> int:
        """Most tokens of the coming iteration; at or below zero, only decodes run, if any do."""
        ...

    def costs(self, load: Load, num_tokens: int) -> TokenCosts:
        """What chunks cost beyond their tokens, where `tokens` said `num_tokens`."""
        ...

    def scheduled(self, load: Load, batch: Batch) -> None:
        """Count what reading prompts costs against the target."""
        ...

    def flex(self, load: Load) -> tuple[int, int]:
        """How many `flex` decodes may run where no prompt of others does, and most tokens then."""
        ...

    def admissions(self, load: Load, sizes: Sequence[int]) -> int | None:
        """How many of those first in line may join, by their tokens; None if it sets no limit."""
        ...

    def pace(self, load: Load) -> tuple[float, float] | None:
        """Tokens of prompts read in a second, and seconds of an iteration; None if not known."""
        ...

    def predict(self, batch: Batch) -> float | None:
        """Seconds that a batch is likely to take, without a margin; None if not known."""
        ...

    def observe(self, batch: Batch, seconds: float) -> None:
        """Learn how long an iteration took."""
        ...


@dataclass(slots=True)
class Squeezed:
    """Iterations that read prompts although they were predicted to be over the target.

    Attributes:
        iterations: how many.
        over_s: seconds that they were predicted to be over it, together.
    """

    iterations: int = 0
    over_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StaticBudget:
    """The same number of tokens in every iteration."""

    max_tokens: int
    tile_tokens: int = 1
    squeezed: Squeezed = field(default_factory=Squeezed)

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"a token budget of {self.max_tokens}; it must be at least 1")
        if self.tile_tokens < 1:
            raise ValueError(f"a tile of {self.tile_tokens} tokens; it must be at least 1")

    def tokens(self, load: Load) -> int:  # noqa: ARG002 - the same for every load
        """`max_tokens`, whatever runs."""
        return self.max_tokens

    def costs(self, load: Load, num_tokens: int) -> TokenCosts:  # noqa: ARG002 - as above
        """No costs: it counts tokens alone."""
        return TokenCosts()

    def scheduled(self, load: Load, batch: Batch) -> None:
        """There is no target."""

    def flex(self, load: Load) -> tuple[int, int]:
        """What the decodes of others leave of `max_tokens`."""
        return max(0, self.max_tokens - len(load.decodes)), self.max_tokens

    def admissions(self, load: Load, sizes: Sequence[int]) -> None:  # noqa: ARG002 - as above
        """No limit but memory and places."""
        return

    def pace(self, load: Load) -> None:  # noqa: ARG002 - as above
        """Nothing is predicted."""
        return

    def predict(self, batch: Batch) -> None:  # noqa: ARG002 - as above
        """Nothing is predicted."""
        return

    def observe(self, batch: Batch, seconds: float) -> None:
        """Nothing is learned."""


class SloBudget:
    """The most prefill tokens that let all decodes keep their time between tokens.

    Beyond the paper, which names a dynamic budget as future work: each iteration takes the longest
    chunk whose predicted time, with a margin for scatter, is within the tightest target of the
    decodes. Without decodes there is nobody to hold up, and prompts run in long chunks. If the
    decodes alone are over the target, nobody else is admitted and prompts that are under way get
    one tile an iteration, at most two. Requests of tier `flex` have no target; they run where no
    prompt of others is read, as many as the decodes of others leave room for. Time that goes into
    copying KV is taken off the target of the iteration, and nothing is learned from it.

    Args:
        tbt_slo_s: the target of requests without one of their own, in seconds from one token of an
            answer to the next.
        predictor: of iterations.
        tile_tokens: see `TokenBudget`; also the least that a prompt under way gets.
        max_tokens: of an iteration.
        num_stages: batches in flight at once, which share the decodes; the predictor predicts each
            from when it is scheduled until its tokens are there.

    Attributes:
        squeezed: what the least that prompts get cost so far.
    """

    def __init__(
        self,
        tbt_slo_s: float,
        predictor: StepTimePredictor,
        *,
        tile_tokens: int = 1,
        max_tokens: int = 2048,
        num_stages: int = 1,
    ) -> None:
        if not tbt_slo_s > 0:
            raise ValueError(f"a target of {tbt_slo_s} s between tokens; it must be above 0")
        self.tbt_slo_s = tbt_slo_s
        self.predictor = predictor
        self.tile_tokens = tile_tokens
        self.max_tokens = max_tokens
        self.num_stages = num_stages
        self.squeezed = Squeezed()

    def tokens(self, load: Load) -> int:
        """All decodes, and as much prefill as their target leaves room for."""
        target_s, rows = self._time_left_s(load), len(load.decodes)
        return self._most_tokens(rows, _start(load), load.context, rows + 1, target_s)[0]

    def costs(self, load: Load, num_tokens: int) -> TokenCosts:
        """Their predicted time, over the time that decodes leave for each token of a chunk.

        That is an average: where first tokens take longer than further ones, costs are too low. No
        costs where decodes leave no time: then prompts get their least.
        """
        rows, seconds = len(load.decodes), self.predictor.seconds
        decodes = BatchShape(max(1, rows), decode_context=load.context, num_sampled=rows + 1)
        left_s = self._time_left_s(load) / self.predictor.margin - seconds(decodes)
        if left_s <= 0 or num_tokens <= rows:
            return TokenCosts()
        each_s, one_s = left_s / (num_tokens - rows), seconds(BatchShape(1))
        row_s = seconds(BatchShape(1, num_sampled=1)) - one_s
        attended_s = seconds(BatchShape(1, prefill_context=1)) - one_s
        return TokenCosts(row_s / each_s, _start(load), attended_s / each_s)

    def scheduled(self, load: Load, batch: Batch) -> None:
        """See `Squeezed`."""
        if load.decodes and any(not c.is_decode and not c.request.is_flex for c in batch.chunks):
            seconds = self.predictor.margin * self.predictor.seconds(BatchShape.of(batch))
            over_s = seconds - self._time_left_s(load)
            if over_s > _ROUNDING * seconds:
                self.squeezed.iterations += 1
                self.squeezed.over_s += over_s

    def flex(self, load: Load) -> tuple[int, int]:
        """As many as are within the target of the other decodes; one at least if there are none."""
        target_s, rows = self._time_left_s(load), len(load.decodes)
        sizes = [request.num_tokens for request in load.flex_decodes]
        count = self._most_decodes(rows, load.context, sizes, target_s)
        count = count if rows else max(count, min(1, len(sizes)))
        context = load.context + sum(sizes[:count])
        all_rows = rows + count
        num_tokens, seconds = self._most_tokens(
            all_rows, _start(load), context, all_rows + 1, target_s
        )
        return count, num_tokens if seconds <= target_s or not rows else all_rows

    def admissions(self, load: Load, sizes: Sequence[int]) -> int:
        """As many as are within the target once all decode; one at least if nothing runs."""
        rows, context = self._rows_and_context(load)
        count = self._most_decodes(rows, context, sizes, self._target_s(load), self.num_stages)
        return count if rows else max(1, count)

    def _most_decodes(
        self, rows: int, context: int, sizes: Sequence[int], target_s: float, num_batches: int = 1
    ) -> int:
        """How many decodes of these contexts fit beside others, the first of them first.

        Args:
            rows: the others.
            context: of the others.
            sizes: the contexts.
            target_s: of a batch, in seconds.
            num_batches: that share all of them evenly.
        """
        contexts = list(accumulate(sizes, initial=context))
        margin = self.predictor.margin

        def fits(count: int) -> bool:
            every = -(-(rows + count) // num_batches)
            context = contexts[count] // num_batches
            shape = BatchShape(every, decode_context=context, num_sampled=every)
            return margin * self.predictor.seconds(shape) <= target_s

        low, high = 0, len(sizes)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low

    def pace(self, load: Load) -> tuple[float, float]:
        """As it would be with all that run at their decodes."""
        rows, context = self._rows_and_context(load)
        target_s = self._target_s(load) if rows else max(self.tbt_slo_s, _IDLE_S)
        rows, context = -(-rows // self.num_stages), context // self.num_stages
        num_tokens, seconds = self._most_tokens(rows, 0, context, rows + 1, target_s)
        return self.num_stages * (num_tokens - rows) / seconds, seconds

    def _rows_and_context(self, load: Load) -> tuple[int, int]:
        """Decodes and their context once all prompts that are under way have been read."""
        prefills = [request for request in load.prefills if not request.is_flex]
        context = load.context + sum(request.num_tokens for request in prefills)
        return len(load.decodes) + len(prefills), context

    def _most_tokens(
        self,
        num_decodes: int,
        start: int,
        context: int,
        num_sampled: int,
        target_s: float,
    ) -> tuple[int, float]:
        """The most tokens within a target, in whole tiles, and their seconds with the margin.

        A whole tile beside the decodes at least, although that may be over the target.

        Args:
            num_decodes: of the tokens.
            start: position in its prompt of the chunk that is the rest of them.
            context: of all decodes.
            num_sampled: rows that a token is sampled from.
            target_s: in seconds.
        """
        margin = self.predictor.margin

        def seconds(tiles: int) -> float:
            chunk = tiles * self.tile_tokens - num_decodes
            context_of_chunk = chunk_context(start, chunk)
            shape = BatchShape(chunk + num_decodes, context_of_chunk, context, num_sampled)
            return margin * self.predictor.seconds(shape)

        low = -(-num_decodes // self.tile_tokens) + 1
        high = max(low, self.max_tokens // self.tile_tokens)
        while low < high:  # the most tiles that fit
            middle = (low + high + 1) // 2
            low, high = (middle, high) if seconds(middle) <= target_s else (low, middle - 1)
        return low * self.tile_tokens, seconds(low)

    def _time_left_s(self, load: Load) -> float:
        """For all that an iteration computes."""
        target_s = self._target_s(load) if load.decodes else max(self.tbt_slo_s, _IDLE_S)
        return target_s - load.copy_s

    def _target_s(self, load: Load) -> float:
        """The tightest target of the decodes."""
        target_s = self.tbt_slo_s if load.tbt_s is None else load.tbt_s
        if not load.all_have_targets:
            target_s = min(target_s, self.tbt_slo_s)
        return _SHARE * target_s

    def predict(self, batch: Batch) -> float:
        """As the predictor has it now."""
        return batch.copies.seconds + self.predictor.seconds(BatchShape.of(batch))

    def observe(self, batch: Batch, seconds: float) -> None:
        """Follow the machine."""
        self.predictor.observe(BatchShape.of(batch), seconds - batch.copies.seconds)


def _start(load: Load) -> int:
    """Where in its prompt the furthest of the prefills under way goes on."""
    return max((request.num_computed_tokens for request in load.prefills), default=0)

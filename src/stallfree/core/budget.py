"""Token budgets: how many tokens an iteration may hold (Sarathi-Serve, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from stallfree.core.batch import Batch
from stallfree.core.load import Load
from stallfree.core.step_time import BatchShape, StepTimePredictor, chunk_context

_IDLE_S = 0.5  # of an iteration that holds up no answer; arrivals and aborts wait for its end
_MOST_ADMISSIONS = 32  # in one iteration


class TokenBudget(Protocol):
    """Asked once in each iteration.

    Attributes:
        tile_tokens: what matrix kernels round rows up to. A prefill chunk that does not end its
            prompt is cut so that the iteration's tokens are a multiple of it ("tile
            quantization": 257 tokens may cost a third more than 256).
    """

    @property
    def tile_tokens(self) -> int: ...

    def tokens(self, load: Load) -> int:
        """Most tokens of the coming iteration; at or below zero, only decodes run, if any do."""
        ...

    def admissions(self, load: Load) -> int | None:
        """How many requests may join those that are admitted; None if it sets no limit."""
        ...

    def pace(self, load: Load) -> tuple[float, float] | None:
        """Tokens of prompts read in a second, and seconds of an iteration; None if not known."""
        ...

    def observe(self, batch: Batch, seconds: float) -> None:
        """Learn how long an iteration took."""
        ...


@dataclass(frozen=True, slots=True)
class StaticBudget:
    """The same number of tokens in every iteration."""

    max_tokens: int
    tile_tokens: int = 1

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"a token budget of {self.max_tokens}; it must be at least 1")
        if self.tile_tokens < 1:
            raise ValueError(f"a tile of {self.tile_tokens} tokens; it must be at least 1")

    def tokens(self, load: Load) -> int:  # noqa: ARG002 - the same for every load
        """`max_tokens`, whatever runs."""
        return self.max_tokens

    def admissions(self, load: Load) -> None:  # noqa: ARG002 - as above
        """No limit but memory and places."""
        return

    def pace(self, load: Load) -> None:  # noqa: ARG002 - as above
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
    one tile an iteration. Requests of tier `flex` have no target, and count as prefills do.

    Args:
        tbt_slo_s: the target of requests without one of their own, in seconds from one token of an
            answer to the next.
        predictor: of iterations.
        tile_tokens: see `TokenBudget`; also the least that a prompt under way gets.
        max_tokens: of an iteration.

    Attributes:
        num_squeezed: iterations in which prompts got their least although that is over the target.
    """

    def __init__(
        self,
        tbt_slo_s: float,
        predictor: StepTimePredictor,
        *,
        tile_tokens: int = 1,
        max_tokens: int = 2048,
    ) -> None:
        if not tbt_slo_s > 0:
            raise ValueError(f"a target of {tbt_slo_s} s between tokens; it must be above 0")
        self.tbt_slo_s = tbt_slo_s
        self.predictor = predictor
        self.tile_tokens = tile_tokens
        self.max_tokens = max_tokens
        self.num_squeezed = 0

    def tokens(self, load: Load) -> int:
        """All decodes, and as much prefill as their target leaves room for."""
        target_s = self._target_s(load) if load.decodes else max(self.tbt_slo_s, _IDLE_S)
        start = max((request.num_computed_tokens for request in load.prefills), default=0)
        num_tokens, seconds = self._most_tokens(
            len(load.decodes),
            start,
            load.context + load.flex_context,
            len(load.decodes) + len(load.flex_decodes) + 1,
            target_s,
        )
        self.num_squeezed += bool(load.decodes and load.prefills and seconds > target_s)
        return num_tokens

    def admissions(self, load: Load) -> int:
        """As many as are within the target once all decode; one at least if nothing runs."""
        rows, context = self._rows_and_context(load)
        target_s = self._target_s(load)

        def fits(count: int) -> bool:
            every = rows + count
            shape = BatchShape(every, decode_context=context, num_sampled=every)
            return self.predictor.seconds(shape) <= target_s

        low, high = 0, _MOST_ADMISSIONS
        while low < high:  # the most that fit
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low if rows else max(1, low)

    def pace(self, load: Load) -> tuple[float, float]:
        """As it would be with all that run at their decodes."""
        rows, context = self._rows_and_context(load)
        target_s = self._target_s(load) if rows else max(self.tbt_slo_s, _IDLE_S)
        num_tokens, seconds = self._most_tokens(rows, 0, context, rows + 1, target_s)
        return (num_tokens - rows) / seconds, seconds

    def _rows_and_context(self, load: Load) -> tuple[int, int]:
        """Decodes and their context once all prompts that are under way have been read."""
        prefills = [request for request in load.prefills if not request.is_flex]
        context = load.context + sum(request.num_tokens for request in prefills)
        return len(load.decodes) + len(prefills), context

    def _most_tokens(
        self, num_decodes: int, start: int, context: int, num_sampled: int, target_s: float
    ) -> tuple[int, float]:
        """The most tokens within a target, in whole tiles, and their seconds with the margin.

        One tile beside the decodes at least, although that may be over the target.

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

        low = num_decodes // self.tile_tokens + 1
        high = max(low, self.max_tokens // self.tile_tokens)
        while low < high:  # the most tiles that fit
            middle = (low + high + 1) // 2
            low, high = (middle, high) if seconds(middle) <= target_s else (low, middle - 1)
        return low * self.tile_tokens, seconds(low)

    def _target_s(self, load: Load) -> float:
        """The tightest target of the decodes."""
        return self.tbt_slo_s if load.tbt_s is None else min(load.tbt_s, self.tbt_slo_s)

    def observe(self, batch: Batch, seconds: float) -> None:
        """Follow the machine."""
        self.predictor.observe(BatchShape.of(batch), seconds)

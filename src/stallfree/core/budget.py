"""Token budgets: how many tokens an iteration may hold (Sarathi-Serve, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stallfree.core.batch import Batch
from stallfree.core.request import Request
from stallfree.core.step_time import BatchShape, StepTimePredictor, chunk_context

_IDLE_S = 0.5  # of an iteration that holds up no answer; arrivals and aborts wait for its end
_MOST_ADMISSIONS = 32  # in one iteration
_QUANTILE = 0.99  # of iterations that shall meet the target


class TokenBudget(Protocol):
    """Asked once in each iteration.

    Attributes:
        tile_tokens: what matrix kernels round rows up to. A prefill chunk that does not end its
            prompt is cut so that the iteration's tokens are a multiple of it ("tile
            quantization": 257 tokens may cost a third more than 256).
    """

    @property
    def tile_tokens(self) -> int: ...

    def tokens(self, running: Sequence[Request]) -> int:
        """Most tokens of the coming iteration; at or below zero, only decodes run, if any do."""
        ...

    def admissions(self, running: Sequence[Request]) -> int | None:
        """How many requests may join those that are admitted; None if it sets no limit."""
        ...

    def pace(self, running: Sequence[Request]) -> tuple[float, float] | None:
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

    def tokens(self, running: Sequence[Request]) -> int:  # noqa: ARG002 - the same for every load
        """`max_tokens`, whatever runs."""
        return self.max_tokens

    def admissions(self, running: Sequence[Request]) -> None:  # noqa: ARG002 - as above
        """No limit but memory and places."""
        return

    def pace(self, running: Sequence[Request]) -> None:  # noqa: ARG002 - as above
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

    def tokens(self, running: Sequence[Request]) -> int:
        """All decodes, and as much prefill as their target leaves room for."""
        decodes = [each for each in running if each.is_decode and not each.is_flex]
        prefills = [each for each in running if not each.is_decode]
        target_s = self._target_s(decodes) if decodes else max(self.tbt_slo_s, _IDLE_S)
        start = max((request.num_computed_tokens for request in prefills), default=0)
        context = sum(request.num_tokens for request in running if request.is_decode)
        num_sampled = len(running) - len(prefills) + 1
        num_tokens, seconds = self._most_tokens(len(decodes), start, context, num_sampled, target_s)
        self.num_squeezed += bool(decodes and prefills and seconds > target_s)
        return num_tokens

    def admissions(self, running: Sequence[Request]) -> int:
        """As many as are within the target once all decode; one at least if nothing runs."""
        protected = [request for request in running if not request.is_flex]
        context = sum(request.num_tokens for request in protected)
        target_s = self._target_s(protected)
        count = 0
        while count < _MOST_ADMISSIONS:
            rows = len(protected) + count + 1
            shape = BatchShape(rows, decode_context=context, num_sampled=rows)
            if self.predictor.seconds(shape) > target_s:
                break
            count += 1
        return count if protected else max(1, count)

    def pace(self, running: Sequence[Request]) -> tuple[float, float]:
        """As it would be with all of `running` at their decodes."""
        rows = [request for request in running if not request.is_flex]
        context = sum(request.num_tokens for request in rows)
        target_s = self._target_s(rows) if rows else max(self.tbt_slo_s, _IDLE_S)
        num_tokens, seconds = self._most_tokens(len(rows), 0, context, len(rows) + 1, target_s)
        return (num_tokens - len(rows)) / seconds, seconds

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
        margin = self.predictor.margin(_QUANTILE)

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

    def _target_s(self, requests: Sequence[Request]) -> float:
        """The tightest target of some requests."""
        own = [each.targets.tbt_s for each in requests]
        return min(
            (self.tbt_slo_s if tbt_s is None else tbt_s for tbt_s in own), default=self.tbt_slo_s
        )

    def observe(self, batch: Batch, seconds: float) -> None:
        """Follow the machine."""
        self.predictor.observe(BatchShape.of(batch), seconds)

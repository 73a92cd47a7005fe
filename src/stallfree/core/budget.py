"""Token budgets: how many tokens an iteration may hold (Sarathi-Serve, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from stallfree.core.request import Request


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

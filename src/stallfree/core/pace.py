"""How fast prompts are read, where the token budget does not predict it: as iterations show it."""

from __future__ import annotations

from stallfree.core.batch import Batch
from stallfree.core.budget import TokenBudget
from stallfree.core.load import Load

_KEPT = 0.9  # of what was known, by each iteration
_GUESS_TOKENS, _GUESS_S = 50.0, 0.05  # of an iteration, before there was one
_GUESS_WEIGHT = 0.01  # of the guess, so that the first prompt counts for nearly all


class MeasuredPace:
    """A budget's own prediction if it has one, else the tokens and seconds of late iterations.

    Args:
        budget: asked first.
    """

    def __init__(self, budget: TokenBudget) -> None:
        self._budget = budget
        self._tokens = _GUESS_WEIGHT * _GUESS_TOKENS  # of iterations that read prompts
        self._seconds = _GUESS_WEIGHT * _GUESS_S
        self._has_read = False
        self._iteration_s = _GUESS_S

    @property
    def is_guess(self) -> bool:
        """Whether nothing is known: the budget predicts nothing, and no prompt has been read."""
        return not self._has_read and self._budget.pace(Load(())) is None

    def observe(self, batch: Batch, seconds: float) -> None:
        """Learn from an iteration."""
        num_tokens = sum(chunk.num_tokens for chunk in batch.chunks if not chunk.is_decode)
        if num_tokens:
            self._tokens = _KEPT * self._tokens + num_tokens
            self._seconds = _KEPT * self._seconds + seconds
            self._has_read = True
        self._iteration_s = _KEPT * self._iteration_s + (1 - _KEPT) * seconds

    def __call__(self, load: Load) -> tuple[float, float]:
        """Tokens of prompts read in a second, and seconds of an iteration."""
        return self._budget.pace(load) or (self._tokens / self._seconds, self._iteration_s)

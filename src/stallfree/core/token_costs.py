"""What chunks of prompts cost beyond their tokens."""

from __future__ import annotations

from typing import NamedTuple


class TokenCosts(NamedTuple):
    """Costs that a limit on tokens does not know of, each worth so many tokens.

    All are zero where nothing is predicted.

    Attributes:
        row: a row whose logits are computed: one after a prompt, or one for each token of a prompt
            that is scored. One such row is in the limit.
        start: the limit is of chunks that begin at this position of their prompt.
        attended: a token of a chunk that begins later, for each position that it does.
    """

    row: float = 0.0
    start: int = 0
    attended: float = 0.0

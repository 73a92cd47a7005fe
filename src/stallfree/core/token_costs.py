"""What chunks of prompts cost beyond their tokens."""

from __future__ import annotations

from typing import NamedTuple


class TokenCosts(NamedTuple):
    """In tokens, as a limit on tokens counts them; where nothing is predicted, all are zero.

    Attributes:
        row: of each row whose logits are computed: one after a prompt, or one for each token of a
            prompt that is scored. The limit reckons with one.
        start: where in its prompt a chunk begins that the limit reckons with.
        attended: of each token of a chunk, by how many tokens after `start` that begins.
    """

    row: float = 0.0
    start: int = 0
    attended: float = 0.0

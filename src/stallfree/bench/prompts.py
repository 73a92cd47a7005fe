"""Prompts of a planned number of tokens, made of common words of about one token each.

How many tokens a word has is measured on the server, whose tokenizer is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from stallfree.bench.workload import Arrival

OWN_WORDS = 16  # at the end of a prompt that shares its beginning with others
WORDS = (
    *("river", "stone", "cloud", "table", "garden", "window", "paper", "light", "water", "bread"),
    *("mountain", "forest", "bridge", "morning", "summer", "winter", "coffee", "letter", "music"),
    *("number", "picture", "question", "answer", "market", "station", "house", "street", "school"),
    *("friend", "family", "doctor", "teacher", "engine", "island", "village", "country", "animal"),
    *("flower", "dinner", "story", "voice", "color", "shape", "earth", "night", "north", "south"),
)


@dataclass(frozen=True, slots=True)
class PromptSize:
    """How many tokens a prompt of so many words has on one server, on average.

    Attributes:
        tokens_per_word: of `WORDS`.
        overhead_tokens: of every prompt, such as those of a chat template.
        is_measured: False if the server does not tell, and a word is taken for a token.
    """

    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0
    is_measured: bool = False

    def words(self, num_tokens: int) -> int:
        """Words of a prompt of about `num_tokens` tokens; at least 1."""
        return max(1, round((num_tokens - self.overhead_tokens) / self.tokens_per_word))


class Prompts:
    """The prompts of one run: no two begin alike, unless their arrivals have one prefix.

    Those share the tokens that are planned, but for one word at least; where that is not planned,
    all but their last `OWN_WORDS` words, as far as both go, or their last half.

    Args:
        size: of the server's prompts.
        salt: of the run; another run with another salt has other prompts.
    """

    def __init__(self, size: PromptSize, salt: int) -> None:
        self._size = size
        self._salt = salt

    def text(self, number: int, arrival: Arrival) -> str:
        """The prompt of the arrival with this number."""
        num_words = self._size.words(arrival.prompt_tokens)
        num_shared = 0
        if arrival.prefix_id is not None:
            num_shared = num_words - min(OWN_WORDS, (num_words + 1) // 2)
            if arrival.prefix_tokens is not None:
                num_shared = min(self._size.words(arrival.prefix_tokens), num_words - 1)
        shared = self._words(f"prefix {arrival.prefix_id}", num_shared)
        return " ".join(shared + self._words(f"request {number}", num_words - num_shared))

    def _words(self, seed: str, count: int) -> list[str]:
        """All words in one order, then in another: so their mean length is that of all."""
        random = Random(f"{self._salt} {seed}")
        words: list[str] = []
        while len(words) < count:
            words += sorted(WORDS, key=lambda _: random.random())  # faster than to shuffle
        return words[:count]

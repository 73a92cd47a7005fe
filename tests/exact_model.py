"""A stand-in for a model that is exact, for schedules: wrong block tables show as wrong answers.

It keeps what each KV slot holds, checks that a chunk finds its whole context there, and samples a
token that depends on every token before it. So a block table that is wrong, a block shared too
early or a token run twice shows. It also keeps for whom a slot was computed: nobody reads what was
computed for others than those he shares with.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from stallfree.core.batch import Batch
from stallfree.core.blocks import BlockPool
from stallfree.core.request import Request

VOCABULARY = 50
END_TOKEN = 0


def next_token(tokens: Sequence[int]) -> int:
    return zlib.crc32(bytes(tokens)) % VOCABULARY


def answer(prompt: Sequence[int], max_tokens: int, min_tokens: int = 0) -> list[int]:
    """What a request must answer, however it is scheduled."""
    tokens = list(prompt)
    for count in range(1, max_tokens + 1):
        tokens.append(next_token(tokens))
        if tokens[-1] == END_TOKEN and count >= min_tokens:
            break
    return tokens[len(prompt) :]


@dataclass
class ExactModel:
    """Remembers the token and the position that each slot holds, and for whom.

    `circle` says with whom a request may share.
    """

    pool: BlockPool
    circle: Callable[[Request], object]
    slots: dict[int, tuple[int, int, object]] = field(default_factory=dict)

    def run(self, batch: Batch) -> list[int]:
        for chunk in batch.chunks:
            request, circle = chunk.request, self.circle(chunk.request)
            tokens = list(request.tokens(0, chunk.stop))
            for position in range(chunk.start, chunk.stop):
                block = request.block_table[position // self.pool.block_size]
                assert self.pool.num_holders(block) == 1, "others read what is written"
                assert self.pool.key_of(block) is None, "what can be found is written"
                self.slots[self._slot(request, position)] = (tokens[position], position, circle)
            if request.pending_finish is not None:
                continue  # nothing of it is used; a batch before this one may have failed
            for position, token in enumerate(tokens):
                assert self.slots[self._slot(request, position)] == (token, position, circle)
        return [next_token(chunk.request.tokens(0, chunk.stop)) for chunk in batch.sampling]

    def _slot(self, request: Request, position: int) -> int:
        block_size = self.pool.block_size
        return request.block_table[position // block_size] * block_size + position % block_size

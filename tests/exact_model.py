"""A stand-in for a model that is exact, for schedules: wrong block tables show as wrong answers.

It keeps what each KV slot holds, checks that a chunk finds its whole context there, and samples a
token that depends on every token before it. So a block table that is wrong, a block shared too
early or a token run twice shows. It also keeps for whom a slot was computed: nobody reads what was
computed for others than those he shares with. It copies blocks, too.
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

    `circle` says with whom a request may share. A block is copied only for the user who wrote
    to it.
    """

    pool: BlockPool
    circle: Callable[[Request], object]
    slots: dict[int, tuple[int, int, object]] = field(default_factory=dict)
    users: dict[int, str] = field(default_factory=dict)  # by block: who wrote to it last
    num_copied: int = 0

    def copy_within(self, batch: Batch) -> None:
        size, within = self.pool.block_size, batch.copies.within
        tables = [(chunk.request.block_table, chunk.request.targets.user) for chunk in batch.chunks]
        old = {each: [self.slots[each * size + i] for i in range(size)] for each, _ in within}
        users = {source: self.users[source] for source, _ in within}
        for source, target in within:
            assert self.pool.num_holders(target) == 1
            assert self.pool.key_of(target) is None
            assert [users[source]] == [user for table, user in tables if target in table]
            self.slots |= {target * size + place: what for place, what in enumerate(old[source])}
            self.num_copied += 1

    def run(self, batch: Batch) -> list[int]:
        self.copy_within(batch)
        return self.run_chunks(batch)

    def run_chunks(self, batch: Batch) -> list[int]:
        for chunk in batch.chunks:
            request, circle = chunk.request, self.circle(chunk.request)
            tokens = list(request.tokens(0, chunk.stop))
            for position in range(chunk.start, chunk.stop):
                block = request.block_table[position // self.pool.block_size]
                assert self.pool.num_holders(block) == 1, "others read what is written"
                assert self.pool.key_of(block) is None, "what can be found is written"
                self.slots[self._slot(request, position)] = (tokens[position], position, circle)
                self.users[block] = request.targets.user
            if request.pending_finish is not None:
                continue  # nothing of it is used; a batch before this one may have failed
            for position, token in enumerate(tokens):
                assert self.slots[self._slot(request, position)] == (token, position, circle)
        return [next_token(chunk.request.tokens(0, chunk.stop)) for chunk in batch.sampling]

    def _slot(self, request: Request, position: int) -> int:
        block_size = self.pool.block_size
        return request.block_table[position // block_size] * block_size + position % block_size

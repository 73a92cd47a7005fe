"""What each replica has read of prompts, so that the next one with the same beginning goes there.

It is a guess: a replica keeps of its KV cache what it can, and the front is not told what that is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


def blocks_of(token_ids: Sequence[int], block_size: int, salt: str | None = None) -> list[int]:
    """The whole blocks of a prompt: of each a hash over its tokens, all before it, and a salt."""
    blocks, last = [], hash(salt)
    for end in range(block_size, len(token_ids) + 1, block_size):
        last = hash((last, *token_ids[end - block_size : end]))
        blocks.append(last)
    return blocks


class Prefixes:
    """The blocks of prompts that one replica has read lately.

    Args:
        num_blocks: most to remember: those that its KV cache has room for.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def num_known(self, blocks: Sequence[int]) -> int:
        """How many blocks of a prompt's beginning it has read."""
        for index, block in enumerate(blocks):
            if block not in self._blocks:
                return index
        return len(blocks)

    def note(self, blocks: Sequence[int]) -> None:
        """Remember a prompt; what was not seen for longest is forgotten, of a prompt its end."""
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._num_blocks:
            self._blocks.popitem(last=False)

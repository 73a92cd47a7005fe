"""The paged KV cache seen as numbers: which blocks are free, and who holds the others.

A block is `block_size` consecutive tokens of KV memory. Requests with the same prompt may hold a
block together: it is reference-counted, and free again when the last holder lets go. Nothing here
knows where the memory is. Paging after vLLM's PagedAttention (SOSP'23).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class OutOfBlocksError(Exception):
    """More blocks were asked for than are free; nothing was allocated."""


class IntegrityError(Exception):
    """The pool and the block tables disagree: a bug in the scheduler."""


class BlockPool:
    """Free list and reference counts of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low ids first
        self._holders = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def num_tokens(self) -> int:
        """Tokens the whole pool can hold."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one holder.

        Raises:
            OutOfBlocksError: fewer are free; the pool is unchanged.
        """
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a holder to each of `blocks`, which must be held already."""
        if any(self._holders[block] == 0 for block in blocks):
            raise IntegrityError(f"sharing a free block among {list(blocks)}")
        for block in blocks:
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one holder of each of `blocks`; those with none left are free again."""
        if any(self._holders[block] == 0 for block in blocks):
            raise IntegrityError(f"releasing a free block among {list(blocks)}")
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                self._free.append(block)

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Compare the pool with the block tables of all requests that hold blocks.

        Raises:
            IntegrityError: a block is leaked, held unknown to the pool, or free twice.
        """
        held = Counter(block for table in block_tables for block in table)
        for block, holders in enumerate(self._holders):
            if held[block] != holders:
                raise IntegrityError(
                    f"block {block}: {holders} holders counted, {held[block]} found"
                )
        free = set(self._free)
        if len(free) != len(self._free) or free != {
            block for block, holders in enumerate(self._holders) if holders == 0
        }:
            raise IntegrityError("the free list and the reference counts disagree")

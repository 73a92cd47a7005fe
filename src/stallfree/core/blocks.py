"""The paged KV cache seen as numbers: which blocks are free, who holds the others, what they hold.

A block is `block_size` consecutive tokens of KV memory. Requests that begin alike may hold a block
together: it is reference-counted, and free again when the last holder lets go. A full block may be
given a key that says what it holds; then it can be found by that key, also while it is free, until
it is allocated anew. Nothing here knows where the memory is. Paging after vLLM's PagedAttention
(SOSP'23).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

from stallfree.core.partial_blocks import PartialBlocks


class OutOfBlocksError(Exception):
    """More blocks were asked for than are free; nothing was allocated."""


class IntegrityError(Exception):
    """The pool and the block tables disagree: a bug in the scheduler."""


class BlockPool:
    """Free lists, reference counts and keys of `num_blocks` blocks of `block_size` tokens.

    Free blocks with a key are the last to be allocated, and of those the one that was let go first
    goes first. A block table is let go from its end, so leaves go before what they follow on.

    Attributes:
        partial: the beginnings of blocks that have a key.
        on_forget: called with each block that is allocated anew, and the key of what it held.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool of {num_blocks} blocks of {block_size} tokens")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._blank = list(range(num_blocks - 1, -1, -1))  # free, no key; a stack: low ids first
        self._kept: OrderedDict[int, None] = OrderedDict()  # free, with a key; oldest first
        self._holders = [0] * num_blocks
        self._keys: dict[int, bytes] = {}  # by block
        self._found: dict[bytes, int] = {}  # blocks by key
        self.partial = PartialBlocks()
        self.on_forget: Callable[[int, bytes], None] = lambda block, key: None  # noqa: ARG005

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, whether they can be found by a key or not."""
        return len(self._blank) + len(self._kept)

    @property
    def num_findable(self) -> int:
        """Blocks that can be found by a key, held or free."""
        return len(self._keys)

    @property
    def num_tokens(self) -> int:
        """Tokens the whole pool can hold."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill, the last one perhaps in part."""
        return -(-num_tokens // self.block_size)

    def num_holders(self, block: int) -> int:
        """How many hold a block."""
        return self._holders[block]

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, each with one holder and no key.

        Raises:
            OutOfBlocksError: fewer are free; the pool is unchanged.
        """
        if count > self.num_free:
            raise OutOfBlocksError(f"{count} blocks wanted, {self.num_free} free")
        blocks = [self._blank.pop() for _ in range(min(count, len(self._blank)))]
        while len(blocks) < count:
            block, _ = self._kept.popitem(last=False)
            key = self._keys.pop(block)
            del self._found[key]
            self.partial.remove(block)
            self.on_forget(block, key)
            blocks.append(block)
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a holder to each of `blocks`, which must be held already or have a key."""
        if any(self._holders[block] == 0 and block not in self._kept for block in blocks):
            raise IntegrityError(f"sharing a free block among {list(blocks)}")
        for block in blocks:
            if self._holders[block] == 0:
                del self._kept[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one holder of each of `blocks`; those with none left are free again."""
        if any(self._holders[block] == 0 for block in blocks):
            raise IntegrityError(f"releasing a free block among {list(blocks)}")
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if block in self._keys:
                    self._kept[block] = None
                else:
                    self._blank.append(block)

    def keep(self, block: int, key: bytes) -> None:
        """Let a held block be found by `key`, unless another one with the same content is."""
        if self._holders[block] == 0 or block in self._keys:
            raise IntegrityError(f"block {block} is free, or has a key already")
        if key not in self._found:
            self._keys[block], self._found[key] = key, block

    def find(self, key: bytes) -> int | None:
        """The block with this key."""
        return self._found.get(key)

    def key_of(self, block: int) -> bytes | None:
        """By what a block can be found."""
        return self._keys.get(block)

    def forget(self) -> None:
        """Let no block be found any more, as what they held is lost or overwritten."""
        self._blank += reversed(self._kept)
        self._kept.clear()
        self._keys.clear()
        self._found.clear()
        self.partial = PartialBlocks()

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Compare the pool with the block tables of all requests that hold blocks.

        Raises:
            IntegrityError: a block is leaked, held unknown to the pool, free twice, or found where
                it should not be.
        """
        held = Counter(block for table in block_tables for block in table)
        for block, holders in enumerate(self._holders):
            if held[block] != holders:
                raise IntegrityError(
                    f"block {block}: {holders} holders counted, {held[block]} found"
                )
        free = {*self._blank, *self._kept}
        if len(free) != self.num_free or free != {
            block for block, holders in enumerate(self._holders) if holders == 0
        }:
            raise IntegrityError("the free lists and the reference counts disagree")
        if {key: block for block, key in self._keys.items()} != self._found:
            raise IntegrityError("the keys of blocks and the blocks of keys disagree")
        if not self.partial.blocks <= self._keys.keys():
            raise IntegrityError("a block is found by its beginning, and not as a whole")
        if any((block in self._kept) != (block in self._keys) for block in free):
            raise IntegrityError("a free block has a key and is not kept, or is and has none")

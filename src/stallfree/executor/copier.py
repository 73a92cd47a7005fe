"""The copies of a batch: within a KV cache, and between it and the swap space."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch

from stallfree.core.batch import Copies
from stallfree.errors import CopyError
from stallfree.executor.swap_store import Cache, SwapStore

Pairs = Sequence[tuple[int, int]]


class BlockCopies(NamedTuple):
    """What is copied, as each process of a model needs to know it.

    Attributes:
        outs: a block and a slot of the swap space each.
        within: a block and the block that it is copied to each.
        ins: a slot and a block each.
    """

    outs: Pairs = ()
    within: Pairs = ()
    ins: Pairs = ()

    @classmethod
    def of(cls, copies: Copies) -> BlockCopies:
        """Those of a batch."""
        return cls(
            tuple((out.block, out.slot) for out in copies.outs),
            tuple((each.source, each.target) for each in copies.within),
            tuple((each.slot, each.block) for each in copies.ins),
        )


NO_BLOCK_COPIES = BlockCopies()


class Copier:
    """Copies blocks of a KV cache.

    Args:
        cache: of a decoder.
        swap: of that cache, if there is one.
    """

    def __init__(self, cache: Cache, swap: SwapStore | None = None) -> None:
        self._blocks = cache.blocks()
        self.swap = swap

    def copy(self, copies: BlockCopies) -> None:
        """Copy out, then within, then in.

        Raises:
            CopyError: something could not be copied. Nothing may run on blocks that were not
                filled.
        """
        if copies.outs:
            self._need_swap().copy(copies.outs, ())
        if copies.within:
            try:
                self._copy_within(copies.within)
            except Exception as error:  # there is no memory, or whatever else
                raise CopyError(f"blocks cannot be copied: {error}") from error
        if copies.ins:
            self._need_swap().copy((), copies.ins)

    def _copy_within(self, pairs: Pairs) -> None:
        """All are read before any is written: a source may be the target of another.

        One layer after the other, so that little memory is needed.
        """
        sources, targets = (
            torch.tensor(ids, device=self._blocks[0].device) for ids in zip(*pairs, strict=True)
        )
        with torch.inference_mode():
            for layer in chain.from_iterable(self._blocks):
                layer.index_copy_(0, targets, layer.index_select(0, sources))

    def _need_swap(self) -> SwapStore:
        assert self.swap is not None, "there is no swap space"
        return self.swap

"""A batch as the int8 kernels take it: where tokens go in the cache, and who attends to what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from stallfree.kernels import attention, shapes
from stallfree.kernels.kv_layout import GROUP
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.rope import Rope

Item = tuple[int, ...]  # of `shapes.Work.items`


def plan(
    batch: ModelInput, block_size: int, item_tokens: int, ropes: Sequence[Rope]
) -> tuple[shapes.Work, int]:
    """The batch as arrays, and how many splits of contexts are computed on their own.

    Args:
        batch: T rows.
        block_size: of the KV cache, in tokens.
        item_tokens: most tokens of a chunk that one unit of attention may have.
        ropes: that rotate queries and keys.
    """
    block_groups = block_size // GROUP
    longest = max(-(-chunk.stop // block_size) for chunk in batch.chunks) * block_groups
    groups = np.zeros((len(batch.chunks), longest), dtype=np.int64)
    parts = np.zeros((len(batch.token_ids), 2), dtype=np.int64)
    positions = np.concatenate([np.arange(c.start, c.stop) for c in batch.chunks])
    slots = np.empty(len(batch.token_ids), dtype=np.int64)
    items: list[Item] = []
    num_parts = 0
    for index, chunk in enumerate(batch.chunks):
        table = np.array(chunk.blocks[: -(-chunk.stop // block_size)])
        own = groups[index, : len(table) * block_groups]
        own[:] = (table[:, None] * block_groups + np.arange(block_groups)).reshape(-1)
        rows = slice(chunk.first_row, chunk.first_row + chunk.stop - chunk.start)
        at = positions[rows]
        slots[rows] = own[at // GROUP] * GROUP + at % GROUP
        splits = -(-chunk.stop // attention.SPLIT)
        if chunk.stop - chunk.start == 1 and splits > 1:
            parts[chunk.first_row] = num_parts, splits
            items += (
                (index, chunk.first_row, chunk.start, 1, split, num_parts + split)
                for split in range(splits)
            )
            num_parts += splits
        else:
            items += _tiles(index, chunk, item_tokens)
    work = shapes.Work(
        token_ids=np.array(batch.token_ids, dtype=np.int64),
        slots=slots,
        angles=np.stack([rope.at(torch.from_numpy(positions), torch.float32) for rope in ropes]),
        groups=groups,
        items=np.array(items, dtype=np.int64),
        parts=parts,
    )
    return work, num_parts


def _tiles(index: int, chunk: Rows, item_tokens: int) -> Iterable[Item]:
    """A chunk's tokens, as many at a time as an item may have; those that see most first."""
    for start in reversed(range(chunk.start, chunk.stop, item_tokens)):
        tokens = min(item_tokens, chunk.stop - start)
        yield index, chunk.first_row + start - chunk.start, start, tokens, -1, 0

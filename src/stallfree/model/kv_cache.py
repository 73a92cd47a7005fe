"""The memory of keys and values: one slot for each token of each block."""

from __future__ import annotations

import torch

from stallfree.model.config import ModelConfig


class KVCache:
    """Keys and values of all layers, by slot (`block_id * block_size + offset`).

    A slot is read only after it was written, so the memory starts uninitialised.

    Attributes:
        keys, values: for each layer, (N * B, K, D).
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (num_blocks * block_size, config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]

    def blocks(self) -> list[torch.Tensor]:
        """All of it as views (layers, N, values of a block), some layers each."""
        return [each.view(1, self.num_blocks, -1) for each in (*self.keys, *self.values)]

    def write(
        self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Store the keys and values (T, K, D) of new tokens in their `slots` (T,)."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (n, K, D) of `slots` (n,), copied together."""
        return self.keys[layer].index_select(0, slots), self.values[layer].index_select(0, slots)

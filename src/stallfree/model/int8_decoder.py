"""The decoder of the Llama family in int8 on CPUs, over compiled kernels.

Weights are rounded per output channel and activations per row; sums are exact. A token's result
is the same, to the last bit, alone and in any batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from stallfree.kernels import attention, attention_tiles, layers, phases, shapes
from stallfree.kernels.int8_matmul import PANEL, ROWS, padded
from stallfree.kernels.ir import LANES
from stallfree.kernels.openmp import BARRIER_WORDS
from stallfree.model.config import ModelConfig
from stallfree.model.int8 import is_supported
from stallfree.model.int8_loader import HALF, Int8Loader
from stallfree.model.int8_plan import plan
from stallfree.model.int8_shares import Int8Shares, exchange_of_logits, exchanges
from stallfree.model.layer_weights import embedding, final_norm, head
from stallfree.model.model_input import ModelInput, Rows
from stallfree.model.part import ModelPart, whole
from stallfree.model.peers import Alone, Exchange, Peers
from stallfree.model.rope import Rope
from stallfree.model.weight_reader import WeightReader
from stallfree.model.weights import WeightSource

_GATES = {"silu": phases.GATE_SILU, "gelu_pytorch_tanh": phases.GATE_GELU}
_FIRST_ROWS = 64  # that scratch memory is made for


class Int8KVCache:
    """Keys and values of all layers, as `kernels.kv_layout` says.

    Attributes:
        keys, values: (L, elements), float32 or bfloat16.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        tokens = num_blocks * block_size * config.num_kv_heads
        self.keys = torch.empty((config.num_layers, tokens * config.head_dim), dtype=dtype)
        width = padded(config.head_dim, LANES)
        self.values = torch.empty((config.num_layers, tokens * width), dtype=dtype)

    def blocks(self) -> list[torch.Tensor]:
        """All of it as views (layers, N, values of a block): blocks are whole groups."""
        layers = len(self.keys)
        return [each.view(layers, self.num_blocks, -1) for each in (self.keys, self.values)]

    def arrays(self) -> shapes.Cache:
        """What the kernels take."""
        return shapes.Cache(_array(self.keys), _array(self.values))


def _array(floats: torch.Tensor) -> Any:
    """As kernels take floats: bfloat16 as the int16 that hold it."""
    is_half = floats.dtype == torch.bfloat16
    return (floats.view(torch.int16) if is_half else floats).numpy()


class Int8Decoder:
    """A model, or one stage of a pipeline, with its weights in int8.

    Args:
        config: the shape of the whole model.
        weights: of the whole model, matrices in int8 (see `int8_cache`).
        max_positions: longest context in tokens, for rope scalings that depend on it.
        threads: that run it.
        kv_dtype: of the KV cache, float32 or bfloat16.
        part: that is loaded and run.
        peers: that have the other shares of its layers.
        on_layer: called with the index of each layer once it is loaded, for progress.

    Attributes:
        config: the shape of the part.

    Raises:
        WeightFileError: a weight is missing, has another shape or type than the configuration
            says, or has no place in it.
        UnsupportedModelError: a matrix is so wide that sums might not fit in 32 bits.
        RuntimeError: the machine does not run the kernels (`int8.is_supported`).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        *,
        max_positions: int,
        threads: int,
        kv_dtype: torch.dtype = torch.bfloat16,
        part: ModelPart | None = None,
        peers: Peers | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        if not is_supported():
            raise RuntimeError("the int8 kernels do not run on this machine")
        self.part = part = part or whole(config)
        self._peers = peers or Alone()
        reader = WeightReader(config, weights, part)
        full, config = config, part.local(config)
        self.config = config
        self.kv_dtype = kv_dtype
        self._threads = threads
        self._ropes = [Rope(config, rope, max_positions) for rope in config.ropes]
        loader = Int8Loader(full, part, reader, threads)
        self._table = self._head = loader.nothing()
        if part.is_first:
            table = loader.single(embedding(full))
            self._table = table._replace(scales=table.scales * np.float32(config.embedding_scale))
        self._layers = loader.all_layers(on_layer)
        if part.is_last:
            self._norm = loader.norm(final_norm(config))
            is_table = config.tie_embeddings and part.is_first
            self._head = table if is_table else loader.single(head(full))
        reader.finish()
        self.num_parameters = reader.num_parameters
        self.weight_bytes = loader.num_bytes
        self._shape = shapes.Shape(
            hidden=config.hidden_size,
            width=padded(config.hidden_size, PANEL),
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            depth=config.head_dim,
            head_width=padded(config.head_dim, LANES),
            epsilon=np.float32(config.norm_eps),
            query_scale=np.float32(math.log2(math.e) * config.query_scale),
            gate=_GATES[config.activation],
        )
        self._scratch = self._make_scratch(_FIRST_ROWS, 0)
        tokens = part.rows(head(full), full)
        self._num_logits = tokens.stop - tokens.start
        self._shares = Int8Shares(tokens) if part.tp_size > 1 else None
        self._logits = np.empty((0, 0), dtype=np.float32)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the KV cache that a token takes."""
        config = self.config
        width = config.head_dim + padded(config.head_dim, LANES)
        size: int = self.kv_dtype.itemsize
        return config.num_layers * config.num_kv_heads * width * size

    def compile(self) -> None:
        """Make the machine code of the kernels, or read it from the cache: nothing waits later.

        Nothing is exchanged with peers, which may be waiting for what is made here.
        """
        cache = self.make_cache(1, LANES)
        hidden = None if self.part.is_first else self.new_hidden(1).zero_()
        peers, self._peers = self._peers, Alone()
        hidden = self.forward(ModelInput([0], [Rows(0, 0, 1, [0])]), cache, hidden)
        if self.part.is_last:
            self.logits(hidden)
        self._peers = peers

    def make_cache(self, num_blocks: int, block_size: int) -> Int8KVCache:
        """A KV cache for this model."""
        return Int8KVCache(self.config, num_blocks, block_size, self.kv_dtype)

    def new_hidden(self, rows: int) -> torch.Tensor:
        """Memory for hidden states float32 (rows, padded hidden), as `forward` takes them."""
        return torch.empty(rows, self._shape.width)

    def forward(
        self, batch: ModelInput, cache: Int8KVCache, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run all layers, writing the new tokens' keys and values to `cache`.

        Args:
            batch: T rows.
            cache: of this part.
            hidden: (T, padded hidden), what the stage before returned; for the first one, None.

        Returns:
            The last hidden states (T, padded hidden), for `logits` or the next stage; the next
            call overwrites them.
        """
        work, num_parts = plan(batch, cache.block_size, self._item_tokens, self._ropes)
        rows = len(batch.token_ids)
        self._reserve(rows, num_parts)
        job = shapes.Job(self._shape, cache.arrays(), work, self._scratch)
        states = self._scratch.hidden[: rows * self._shape.width]
        if hidden is not None:
            states[:] = hidden.reshape(-1).numpy()
        if self._shares is None:
            layers.run(self._threads, self._table, self._layers, job)
        else:
            self._shares.run(self._threads, self._table, self._layers, job, self._peers)
        return torch.from_numpy(states.reshape(rows, self._shape.width))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 (R, V) of rows (R, padded hidden) of what `forward` returned.

        The next call overwrites them.
        """
        rows = len(hidden)
        self._reserve(rows, 0)
        if rows > len(self._logits):
            self._logits = np.empty((rows, len(self._head.scales)), dtype=np.float32)
        out = self._logits[:rows]
        for first in range(0, rows, shapes.SLICE_ROWS):
            some = slice(first, first + shapes.SLICE_ROWS)
            layers.run_logits(
                self._threads,
                hidden[some].numpy(),
                self._norm,
                self._head,
                self._shape,
                out[some],
                self._scratch,
            )
        logits = self._peers.concat(torch.from_numpy(out)[:, : self._num_logits])
        return logits[:, : self.config.vocab_size]

    def exchanges(self, rows: int, logits: Sequence[int]) -> list[Exchange]:
        """What `forward` of so many rows exchanges with peers, and `logits` of so many each."""
        made = exchanges(self.part, self._shape.width, rows)
        return made + [exchange_of_logits(n, self._num_logits) for n in logits]

    @property
    def _item_tokens(self) -> int:
        group = self.config.num_heads // self.config.num_kv_heads
        tokens: int = attention.ITEM_ROWS // group
        return max(1, tokens)

    def _reserve(self, rows: int, num_parts: int) -> None:
        """Make scratch memory for so many rows and splits, if there is less."""
        capacity = len(self._scratch.hidden) // padded(self.config.hidden_size, PANEL)
        if rows > capacity or num_parts > len(self._scratch.part_sums) // self.config.num_heads:
            self._scratch = self._make_scratch(max(rows, capacity), num_parts)

    def _make_scratch(self, rows: int, num_parts: int) -> shapes.Scratch:
        config, threads = self.config, self._threads
        sliced = padded(min(rows, shapes.SLICE_ROWS), ROWS)
        width = padded(config.hidden_size, PANEL)
        heads = config.num_heads * config.head_dim
        attended = padded(heads, LANES)
        inner = padded(config.intermediate_size, HALF)
        head_width = padded(config.head_dim, LANES)
        group = config.num_heads // config.num_kv_heads
        item_rows = padded(self._item_tokens * group, attention_tiles.ROWS)
        factors = attention_tiles.factor_dtype(self.kv_dtype)
        stretches = attention_tiles.ROWS * attention_tiles.STRETCH

        def floats(*shape: int) -> Any:
            return torch.zeros(shape).numpy()

        return shapes.Scratch(
            hidden=floats(rows * width),
            activations=torch.zeros(
                sliced * max(width, attended, inner), dtype=torch.uint8
            ).numpy(),
            scales=floats(sliced),
            zeros=np.zeros(sliced, dtype=np.int32),
            wide=floats(sliced * max(self._layers.qkv.scales.shape[1], inner, width)),
            queries=floats(rows * heads),
            attended=floats(rows * attended),
            part=floats(num_parts * config.num_heads * head_width),
            part_sums=floats(num_parts * config.num_heads),
            part_tops=floats(num_parts * config.num_heads),
            counter=np.zeros(1, dtype=np.int64),
            barrier=np.zeros(BARRIER_WORDS, dtype=np.int64),
            thread_sums=torch.zeros((threads, ROWS * PANEL), dtype=torch.int32).numpy(),
            thread_row=floats(threads, width),
            thread_queries=_array(
                torch.zeros((threads, item_rows * config.head_dim), dtype=factors)
            ),
            thread_out=floats(threads, item_rows * head_width),
            thread_total=floats(threads, item_rows * head_width),
            thread_stats=floats(threads, 4, item_rows + 2 * LANES),
            thread_weight_sums=floats(threads, item_rows * LANES),
            thread_scores=floats(threads, stretches),
            thread_weights=_array(torch.zeros((threads, stretches), dtype=factors)),
            thread_places=np.zeros((threads, 2 * attention_tiles.LATER), dtype=np.int64),
        )

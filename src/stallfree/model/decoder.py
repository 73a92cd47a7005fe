"""The decoder of the Llama family in PyTorch: a plain forward pass over the rows of a batch.

It runs in floats on any device. On CPUs `Int8Decoder` is what is faster.

Legend of shapes: T rows (tokens) of the batch, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stallfree.model.attention import Span, attend, make_spans
from stallfree.model.config import ModelConfig
from stallfree.model.kv_cache import KVCache
from stallfree.model.linear import Linear, keeps_copy, make_linear
from stallfree.model.model_input import ModelInput
from stallfree.model.part import ModelPart, whole
from stallfree.model.rope import Rope, apply_rope
from stallfree.model.weight_reader import WeightReader, names_of_layer
from stallfree.model.weights import WeightSource

MLP_ROWS = 2048  # at once: schedulers without a budget make batches of any length


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer; `q_norm` and `k_norm` only where the architecture has them."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class _Placed:
    """A batch on the device: the same in every layer, so made once.

    Attributes:
        angles: (T, 2, D), see `Rope.at`.
        slots: int64 (T,), the KV slot that each token is written to.
        spans: by sliding window (None: none), the spans that cover all rows.
    """

    angles: torch.Tensor
    slots: torch.Tensor
    spans: dict[int | None, list[Span]]


class Decoder:
    """A model, or one stage of a pipeline, with its weights.

    Args:
        config: the shape of the whole model.
        weights: of the whole model, read one tensor at a time, so that nothing is in memory twice.
        max_positions: longest context in tokens, for rope scalings that depend on it.
        dtype, device: of the weights and the computation.
        part: that is loaded and run.
        on_layer: called with the index of each layer once it is loaded, for progress.

    Attributes:
        config: the shape of the part.

    Raises:
        WeightFileError: a weight is missing, has another shape or type than the configuration
            says, or has no place in it.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        *,
        max_positions: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        part: ModelPart | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        self.part = part = part or whole(config)
        self._reader = WeightReader(config, weights, part)
        self.config = config = part.local(config)
        self.dtype = dtype
        self.device = torch.device(device)
        self.weight_bytes = 0
        self._rope = Rope(config, max_positions, device)
        shape = (config.vocab_size, config.hidden_size)
        embedding = "model.embed_tokens.weight"
        if part.is_first:
            self._embedding = self._tensor(embedding, shape)
        self._layers = []
        for layer in part.layers:
            self._layers.append(self._load_layer(layer))
            if on_layer is not None:
                on_layer(layer)
        if part.is_last:
            self._norm = self._tensor("model.norm.weight", (config.hidden_size,))
            if not config.tie_embeddings:
                output = self._tensor("lm_head.weight", shape)
            elif not part.is_first:
                output = self._tensor(embedding, shape)
            else:
                output = self._embedding
                self.weight_bytes += output.nbytes if keeps_copy(output) else 0
            self._lm_head = make_linear(output)
        self._reader.finish(unused="lm_head.weight" if config.tie_embeddings else None)
        self.num_parameters = self._reader.num_parameters
        del self._reader

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the KV cache that a token takes."""
        size: int = self.dtype.itemsize
        return self.config.kv_values_per_token * size

    def make_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """A KV cache for this model."""
        return KVCache(self.config, num_blocks, block_size, self.dtype, self.device)

    def _load_layer(self, layer: int) -> _Layer:
        config, names = self.config, names_of_layer(self.config, layer)
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        head_norm = (config.head_dim,)
        return _Layer(
            input_norm=self._tensor(names.input_norm, (hidden,)),
            qkv=self._linear(names.qkv, hidden, config.qkv_bias),
            q_norm=self._tensor(names.q_norm, head_norm) if config.qk_norm else None,
            k_norm=self._tensor(names.k_norm, head_norm) if config.qk_norm else None,
            output=self._linear(names.output, heads, config.output_bias),
            mlp_norm=self._tensor(names.mlp_norm, (hidden,)),
            gate_up=self._linear(names.gate_up, hidden, config.mlp_bias),
            down=self._linear(names.down, config.intermediate_size, config.mlp_bias),
        )

    def _linear(self, out_sizes: dict[str, int], in_size: int, has_bias: bool) -> Linear:
        """One layer of several projections of the same input, one under the other."""
        weights = [self._tensor(f"{n}.weight", (size, in_size)) for n, size in out_sizes.items()]
        bias = None
        if has_bias:
            bias = torch.cat([self._tensor(f"{n}.bias", (size,)) for n, size in out_sizes.items()])
        return make_linear(torch.cat(weights) if len(weights) > 1 else weights[0], bias)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        read = self._reader.floats(name, shape)
        placed = read.to(device=self.device, dtype=self.dtype).contiguous()
        self.weight_bytes += placed.nbytes
        return placed

    def new_hidden(self, rows: int) -> torch.Tensor:
        """Memory for hidden states (rows, hidden), as `forward` takes them."""
        shape = (rows, self.config.hidden_size)
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def forward(
        self, batch: ModelInput, cache: KVCache, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run all layers, writing the new tokens' keys and values to `cache`.

        Args:
            batch: T rows.
            cache: of this part.
            hidden: (T, hidden), what the stage before returned; for the first one, None.

        Returns:
            The last hidden states (T, hidden), for `logits` or the next stage.
        """
        placed = self._place(batch, cache.block_size)
        if hidden is None:
            token_ids = torch.tensor(batch.token_ids, device=self.device)
            hidden = F.embedding(token_ids, self._embedding)
        for index, layer in enumerate(self._layers):
            attended = self._attention(index, layer, hidden, placed, cache)
            hidden = hidden + layer.output(attended)
            hidden = torch.cat([self._mlp(layer, rows) for rows in hidden.split(MLP_ROWS)])
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 (R, V) of rows (R, hidden) of what `forward` returned."""
        return self._lm_head(self._rms_norm(hidden, self._norm)).float()

    def _place(self, batch: ModelInput, block_size: int) -> _Placed:
        slots = []
        spans: dict[int | None, list[Span]] = {w: [] for w in self.config.sliding_windows}
        for chunk in batch.chunks:
            context = chunk.slots(block_size).to(self.device)
            slots.append(context[chunk.start :])
            for window, of_window in spans.items():
                of_window += make_spans(chunk.first_row, chunk.start, chunk.stop, context, window)
        angles = self._rope.at(batch.positions().to(self.device), self.dtype)
        return _Placed(angles, torch.cat(slots), spans)

    def _mlp(self, layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = layer.gate_up(self._rms_norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
        return hidden + layer.down(F.silu(gate) * up)

    def _attention(
        self, index: int, layer: _Layer, hidden: torch.Tensor, batch: _Placed, cache: KVCache
    ) -> torch.Tensor:
        """Heads of the attention, one after the other: (T, H * D)."""
        config = self.config
        qkv = layer.qkv(self._rms_norm(hidden, layer.input_norm))
        heads = qkv.view(len(qkv), -1, config.head_dim)  # (T, H + 2K, D)
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._rms_norm(q, layer.q_norm), self._rms_norm(k, layer.k_norm)
        cache.write(index, batch.slots, apply_rope(k, batch.angles), v)
        spans = batch.spans[config.sliding_windows[index]]
        return attend(apply_rope(q, batch.angles), cache, index, spans).flatten(1)

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)

"""The decoder in PyTorch: a plain forward pass over the rows of a batch.

It runs every architecture in floats on any device. On CPUs `Int8Decoder` is what is faster, where
it can run a model.

Legend of shapes: T rows (tokens) of the batch, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stallfree.model.attention import Span, attend, make_spans
from stallfree.model.config import ModelConfig
from stallfree.model.kv_cache import KVCache
from stallfree.model.layer_weights import (
    LayerWeights,
    MlpWeights,
    NormWeights,
    Projection,
    embedding,
    final_norm,
    head,
    layer_weights,
)
from stallfree.model.linear import Linear, keeps_copy, make_linear
from stallfree.model.mlp import ACTIVATIONS, Mlp, gated_mlp, mixture, plain_mlp
from stallfree.model.model_input import ModelInput
from stallfree.model.norms import Norm, make_norm, no_norm
from stallfree.model.part import ModelPart, whole
from stallfree.model.peers import Alone, Exchange, Peers
from stallfree.model.rope import Rope, apply_rope
from stallfree.model.weight_reader import WeightReader
from stallfree.model.weights import WeightSource

MLP_ROWS = 2048  # at once: schedulers without a budget make batches of any length


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer, ready to run. Where the architecture has no norm, it is `no_norm`."""

    input_norm: Norm
    qkv: Linear
    q_norm: Norm
    k_norm: Norm
    output: Linear
    post_attention_norm: Norm
    mlp_norm: Norm
    mlp: Mlp
    post_mlp_norm: Norm


@dataclass(frozen=True, slots=True)
class _Placed:
    """A batch on the device: the same in every layer, so made once.

    Attributes:
        slots: int64 (T,), the KV slot that each token is written to.
        angles: of each of the model's `ropes`, (T, 2, D), see `Rope.at`.
        spans: by sliding window (None: none), the spans that cover all rows.
    """

    slots: torch.Tensor
    angles: list[torch.Tensor]
    spans: dict[int | None, list[Span]]


class Decoder:
    """A model, or one stage of a pipeline, with its weights.

    Args:
        config: the shape of the whole model.
        weights: of the whole model, read one tensor at a time, so that nothing is in memory twice.
        max_positions: longest context in tokens, for rope scalings that depend on it.
        dtype, device: of the weights and the computation.
        part: that is loaded and run.
        peers: that have the other shares of its layers.
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
        peers: Peers | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        self.part = part = part or whole(config)
        self._peers = peers or Alone()
        self._reader = WeightReader(config, weights, part)
        full, config = config, part.local(config)
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.weight_bytes = 0
        self._ropes = [Rope(config, rope, max_positions, device) for rope in config.ropes]
        self._layers = []
        if part.is_first:
            self._embedding = self._place(self._reader.weight(embedding(full)))
            scale = torch.tensor(config.embedding_scale, dtype=dtype, device=device)
            self._embedding_scale = scale
        for layer in part.layers:
            self._layers.append(self._load_layer(layer_weights(full, layer)))
            if on_layer is not None:
                on_layer(layer)
        if part.is_last:
            self._norm = self._load_norm(final_norm(config))
            self._lm_head = self._load_head(full)
        self._reader.finish()
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

    def _load_head(self, config: ModelConfig) -> Linear:
        if not (config.tie_embeddings and self.part.is_first):
            return self._load_linear(head(config))
        self.weight_bytes += self._embedding.nbytes if keeps_copy(self._embedding) else 0
        return make_linear(self._embedding)

    def _load_layer(self, weights: LayerWeights) -> _Layer:
        input_norm = self._load_norm(weights.input_norm)
        return _Layer(
            input_norm=input_norm,
            qkv=self._load_linear(weights.q, weights.k, weights.v),
            q_norm=self._load_norm(weights.q_norm),
            k_norm=self._load_norm(weights.k_norm),
            output=self._load_linear(weights.output),
            post_attention_norm=self._load_norm(weights.post_attention_norm),
            mlp_norm=self._load_norm(weights.mlp_norm) if weights.mlp_norm else input_norm,
            mlp=self._load_mlps(weights),
            post_mlp_norm=self._load_norm(weights.post_mlp_norm),
        )

    def _load_mlps(self, weights: LayerWeights) -> Mlp:
        if weights.router is None:
            return self._load_mlp(weights.mlps[0])
        experts = {number: self._load_mlp(expert) for number, expert in enumerate(weights.mlps)}
        router = self._load_linear(weights.router)
        return mixture(router, experts, self.config.experts_per_token)

    def _load_mlp(self, weights: MlpWeights) -> Mlp:
        activation = ACTIVATIONS[self.config.activation]
        down = self._load_linear(weights.down)
        if weights.gate is None:
            return plain_mlp(self._load_linear(weights.up), down, activation)
        return gated_mlp(self._load_linear(weights.gate, weights.up), down, activation)

    def _load_linear(self, *projections: Projection) -> Linear:
        """One layer of projections of the same input, one under the other."""
        weights = [self._place(self._reader.weight(each)) for each in projections]
        bias = None
        if projections[0].has_bias:
            bias = torch.cat([self._place(self._reader.bias(each)) for each in projections])
        return make_linear(torch.cat(weights) if len(weights) > 1 else weights[0], bias)

    def _load_norm(self, weights: NormWeights | None) -> Norm:
        if weights is None:
            return no_norm
        shape = (weights.size,)
        weight = self._place(self._reader.floats(f"{weights.name}.weight", shape))
        bias = None
        if weights.has_bias:
            bias = self._place(self._reader.floats(f"{weights.name}.bias", shape))
        return make_norm(self.config.norm, weight, bias, self.config.norm_eps)

    def _place(self, read: torch.Tensor) -> torch.Tensor:
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
        placed = self._arrange(batch, cache.block_size)
        if hidden is None:
            hidden = self._embed(torch.tensor(batch.token_ids, device=self.device))
        for index, layer in enumerate(self._layers):
            attended = layer.output(self._attention(index, layer, hidden, placed, cache))
            after = hidden + layer.post_attention_norm(self._peers.sum(attended))
            mlp_input = hidden if self.config.is_parallel else after
            hidden = after + self._mlp(layer, mlp_input)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 (R, V) of rows (R, hidden) of what `forward` returned."""
        logits = self._peers.concat(self._lm_head(self._norm(hidden)))
        return logits[:, : self.config.vocab_size].float()

    def exchanges(self, rows: int, logits: Sequence[int]) -> list[Exchange]:
        """What `forward` of so many rows exchanges with peers, and `logits` of so many each."""
        hidden = Exchange("sum", (rows, self.config.hidden_size), self.dtype, self.device)
        made = [hidden] * (self.part.is_first + 2 * len(self._layers))
        share = -(-self.config.vocab_size // self.part.tp_size)
        return made + [Exchange("concat", (n, share), self.dtype, self.device) for n in logits]

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings (T, hidden) of `token_ids` (T,), of which each peer has some."""
        if self.part.tp_size > 1:
            own = token_ids - self.part.tp_rank * len(self._embedding)
            elsewhere = (own < 0) | (own >= len(self._embedding))
            rows = F.embedding(own.masked_fill(elsewhere, 0), self._embedding)
            found = self._peers.sum(rows.masked_fill(elsewhere[:, None], 0))
        else:
            found = F.embedding(token_ids, self._embedding)
        return found * self._embedding_scale

    def _arrange(self, batch: ModelInput, block_size: int) -> _Placed:
        slots = []
        spans: dict[int | None, list[Span]] = {w: [] for w in self.config.sliding_windows}
        for chunk in batch.chunks:
            context = chunk.slots(block_size).to(self.device)
            slots.append(context[chunk.start :])
            for window, of_window in spans.items():
                of_window += make_spans(chunk.first_row, chunk.start, chunk.stop, context, window)
        positions = batch.positions().to(self.device)
        angles = [rope.at(positions, self.dtype) for rope in self._ropes]
        return _Placed(torch.cat(slots), angles, spans)

    def _mlp(self, layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
        """What the MLP adds to the hidden states: (T, hidden)."""
        some = hidden.split(MLP_ROWS)
        added = torch.cat([layer.mlp(layer.mlp_norm(rows)) for rows in some])
        return layer.post_mlp_norm(self._peers.sum(added))

    def _attention(
        self, index: int, layer: _Layer, hidden: torch.Tensor, batch: _Placed, cache: KVCache
    ) -> torch.Tensor:
        """Heads of the attention, one after the other: (T, H * D)."""
        config, window = self.config, self.config.sliding_windows[index]
        qkv = layer.qkv(layer.input_norm(hidden))
        heads = qkv.view(len(qkv), -1, config.head_dim)  # (T, H + 2K, D)
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        angles = batch.angles[config.rope_number(index)]
        q, k = apply_rope(layer.q_norm(q), angles), apply_rope(layer.k_norm(k), angles)
        cache.write(index, batch.slots, k, v)
        return attend(q, cache, index, batch.spans[window], config.query_scale).flatten(1)

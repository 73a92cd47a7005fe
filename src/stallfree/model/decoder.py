"""The decoder of the Llama family: a plain forward pass over the packed rows of a batch.

Legend of shapes: T rows (tokens) of the batch, H query heads, K key heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stallfree.errors import WeightFileError
from stallfree.model.attention import Span, attend
from stallfree.model.config import ModelConfig
from stallfree.model.int8_cache import SCALES
from stallfree.model.kv_cache import KVCache
from stallfree.model.linear import (
    Linear,
    Matrix,
    keeps_copy,
    make_embedding,
    make_linear,
    stack,
)
from stallfree.model.rope import Rope, apply_rope
from stallfree.model.weights import WeightSource

MLP_ROWS = 2048  # at once: schedulers without a budget make batches of any length
_RECOMPUTED = ".rotary_emb.inv_freq"  # old files keep it; it follows from the configuration


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One batch as tensors.

    Attributes:
        token_ids: int64 (T,).
        positions: int64 (T,), of each token in its request.
        slots: int64 (T,), the KV slot that each token is written to.
        spans: by sliding window (None: none), the spans that cover all rows.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    spans: dict[int | None, list[Span]]


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


class Decoder:
    """A model with its weights.

    Args:
        config: its shape.
        weights: read one tensor at a time, so that nothing is in memory twice. Matrices may come
            in int8 (see `int8_cache`).
        max_positions: longest context in tokens, for rope scalings that depend on it.
        dtype, device: of the weights and the computation.
        on_layer: called with the index of each layer once it is loaded, for progress.

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
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        self.num_parameters = 0
        self.weight_bytes = 0
        self._weights = weights
        self._unread = set(weights.names())
        self._rope = Rope(config, max_positions, device)
        shape = (config.vocab_size, config.hidden_size)
        embedding = self._matrix("model.embed_tokens.weight", shape)
        self._embedding = make_embedding(embedding)
        self._layers = []
        for layer in range(config.num_layers):
            self._layers.append(self._load_layer(layer))
            if on_layer is not None:
                on_layer(layer)
        self._norm = self._tensor("model.norm.weight", (config.hidden_size,))
        output = embedding
        if config.tie_embeddings:
            self._unread -= {"lm_head.weight", "lm_head.weight" + SCALES}
            self.weight_bytes += output.values.nbytes if keeps_copy(output) else 0
        else:
            output = self._matrix("lm_head.weight", shape)
        self._lm_head = make_linear(output)
        self._check_all_read()
        del self._weights, self._unread

    def _load_layer(self, layer: int) -> _Layer:
        config, prefix = self.config, f"model.layers.{layer}"
        hidden, inner = config.hidden_size, config.intermediate_size
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        head_norm = (config.head_dim,)
        return _Layer(
            input_norm=self._tensor(f"{prefix}.input_layernorm.weight", (hidden,)),
            qkv=self._linear(
                {
                    f"{attention}.q_proj": q_size,
                    f"{attention}.k_proj": kv_size,
                    f"{attention}.v_proj": kv_size,
                },
                hidden,
                config.qkv_bias,
            ),
            q_norm=self._tensor(f"{attention}.q_norm.weight", head_norm)
            if config.qk_norm
            else None,
            k_norm=self._tensor(f"{attention}.k_norm.weight", head_norm)
            if config.qk_norm
            else None,
            output=self._linear({f"{attention}.o_proj": hidden}, q_size, config.output_bias),
            mlp_norm=self._tensor(f"{prefix}.post_attention_layernorm.weight", (hidden,)),
            gate_up=self._linear(
                {f"{mlp}.gate_proj": inner, f"{mlp}.up_proj": inner}, hidden, config.mlp_bias
            ),
            down=self._linear({f"{mlp}.down_proj": hidden}, inner, config.mlp_bias),
        )

    def _linear(self, out_sizes: dict[str, int], in_size: int, has_bias: bool) -> Linear:
        """One layer of several projections of the same input, one under the other."""
        weights = [self._matrix(f"{n}.weight", (size, in_size)) for n, size in out_sizes.items()]
        bias = None
        if has_bias:
            bias = torch.cat([self._tensor(f"{n}.bias", (size,)) for n, size in out_sizes.items()])
        return make_linear(stack(weights), bias)

    def _matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        """A weight, with its scales if it comes in int8."""
        values = self._read(name, shape)
        if values.dtype != torch.int8:
            return Matrix(self._placed(name, values))
        self.weight_bytes += values.nbytes
        scales = self._weights.tensor(name + SCALES)
        self._unread.discard(name + SCALES)
        if tuple(scales.shape) != shape[:1]:
            raise WeightFileError(f"the scales of {name} have shape {tuple(scales.shape)}")
        return Matrix(values, scales)

    def _check_all_read(self) -> None:
        """Refuse weights that the architecture has no place for: answers would be wrong."""
        unread = sorted(name for name in self._unread if not name.endswith(_RECOMPUTED))
        if unread:
            raise WeightFileError(
                f"{self.config.architecture} as configured has no weight {unread[0]} "
                f"(nor {len(unread) - 1} others that are in the files)"
            )

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._placed(name, self._read(name, shape))

    def _placed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            raise WeightFileError(f"weight {name} is of type {tensor.dtype}, which is not a float")
        placed = tensor.to(device=self.device, dtype=self.dtype).contiguous()
        self.weight_bytes += placed.nbytes
        return placed

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._weights.tensor(name)
        self._unread.discard(name)
        if tuple(tensor.shape) != shape:
            raise WeightFileError(
                f"weight {name} has shape {tuple(tensor.shape)}; the configuration says {shape}"
            )
        self.num_parameters += tensor.numel()
        return tensor

    def forward(self, batch: ModelInput, cache: KVCache) -> torch.Tensor:
        """Run all layers, writing the new tokens' keys and values to `cache`.

        Returns:
            The last hidden states (T, hidden), for `logits`.
        """
        hidden = self._embedding(batch.token_ids)  # (T, hidden)
        angles = self._rope.at(batch.positions, self.dtype)
        for index, layer in enumerate(self._layers):
            attended = self._attention(index, layer, hidden, angles, batch, cache)
            hidden = hidden + layer.output(attended)
            hidden = torch.cat([self._mlp(layer, rows) for rows in hidden.split(MLP_ROWS)])
        return hidden

    def _mlp(self, layer: _Layer, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = layer.gate_up(self._rms_norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
        return hidden + layer.down(F.silu(gate) * up)

    def _attention(
        self,
        index: int,
        layer: _Layer,
        hidden: torch.Tensor,
        angles: torch.Tensor,
        batch: ModelInput,
        cache: KVCache,
    ) -> torch.Tensor:
        """Heads of the attention, one after the other: (T, H * D)."""
        config = self.config
        qkv = layer.qkv(self._rms_norm(hidden, layer.input_norm))
        heads = qkv.view(len(qkv), -1, config.head_dim)  # (T, H + 2K, D)
        q, k, v = heads.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._rms_norm(q, layer.q_norm), self._rms_norm(k, layer.k_norm)
        cache.write(index, batch.slots, apply_rope(k, angles), v)
        spans = batch.spans[config.sliding_windows[index]]
        return attend(apply_rope(q, angles), cache, index, spans).flatten(1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 (R, V) of rows (R, hidden) of what `forward` returned."""
        return self._lm_head(self._rms_norm(hidden, self._norm)).float()

    def _rms_norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)


def windows_of(config: ModelConfig) -> Iterable[int | None]:
    """The different sliding windows that the layers use."""
    return dict.fromkeys(config.sliding_windows)

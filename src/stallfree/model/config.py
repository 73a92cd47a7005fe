"""What shape a model has.

Built from a `config.json` of Hugging Face (or the like of one, made from GGUF metadata). What the
architectures are is in `architectures`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stallfree.errors import UnsupportedModelError, WeightFileError
from stallfree.model.architectures import Architecture, Names, Words, describe
from stallfree.model.config_fields import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_SIZE,
    integer,
    number,
)
from stallfree.model.mlp import ACTIVATIONS
from stallfree.model.rope_config import RopeConfig, read_rope


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder. Where the architecture alone decides, see `Architecture`.

    Attributes:
        names: what the weights are called.
        norm_eps: what norms add to the variance, against division by zero.
        activation: a key of `mlp.ACTIVATIONS`.
        sliding_windows: for each layer, how many of the latest tokens a token attends to (itself
            included), or None for all.
        max_position_embeddings: context the model was made for, before any rope scaling.
        rope: of layers that attend to all tokens; of those with a window too, if there is no
            `window_rope`.
        embedding_scale: on embeddings.
        query_scale: on the products of queries and keys.
        num_experts: MLPs of a layer that a router chooses from; 0 if there is one, for all tokens.
        experts_per_token: how many of them each token goes through.
    """

    architecture: str
    names: Names
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: str
    norm_eps: float
    activation: str
    is_gated: bool
    is_parallel: bool
    max_position_embeddings: int
    rope: RopeConfig
    window_rope: RopeConfig | None
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    embedding_scale: float
    query_scale: float
    num_experts: int
    experts_per_token: int

    @property
    def max_context(self) -> int:
        """Longest context in tokens, rope scaling included."""
        return self.rope.longest(self.max_position_embeddings)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache keeps of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embeddings, of which each layer has one."""
        return (self.rope,) if self.window_rope is None else (self.rope, self.window_rope)

    def rope_number(self, layer: int) -> int:
        """Which of `ropes` layer `layer` has."""
        return int(self.window_rope is not None and self.sliding_windows[layer] is not None)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face configuration.

        Raises:
            UnsupportedModelError: the architecture, activation or rope scaling is not implemented;
                names it and what is.
            WeightFileError: a value is missing or makes no sense.
        """
        name, architecture, words = describe(config)
        num_heads = integer(words, "num_attention_heads", MAX_SIZE)
        hidden_size = integer(words, "hidden_size", MAX_SIZE)
        num_layers = integer(words, "num_hidden_layers", MAX_LAYERS)
        num_kv_heads = integer(words, "num_key_value_heads", MAX_SIZE, num_heads)
        head_dim = integer(words, "head_dim", MAX_SIZE, hidden_size // num_heads)
        if num_heads % num_kv_heads or head_dim % 2:
            raise WeightFileError(
                f"{num_heads} query heads of {head_dim} over {num_kv_heads} key heads: "
                "the heads must divide and their size must be even"
            )
        bias = bool(words.get("attention_bias", False))
        context = integer(words, "max_position_embeddings", MAX_CONTEXT, 2048)
        num_experts, experts_per_token = _experts(words, architecture)
        return cls(
            architecture=name,
            names=architecture.names,
            vocab_size=integer(words, "vocab_size", MAX_SIZE),
            hidden_size=hidden_size,
            intermediate_size=integer(words, "intermediate_size", MAX_SIZE),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm=architecture.norm,
            norm_eps=number(words, "rms_norm_eps", 0, 1, 1e-6),
            activation=_activation(words),
            is_gated=architecture.is_gated,
            is_parallel=architecture.is_parallel,
            max_position_embeddings=context,
            rope=read_rope(words, context, head_dim),
            window_rope=_window_rope(words, architecture, context, head_dim),
            tie_embeddings=bool(words.get("tie_word_embeddings", False)),
            qkv_bias=bias if architecture.qkv_bias is None else architecture.qkv_bias,
            output_bias=bias if architecture.output_bias is None else architecture.output_bias,
            mlp_bias=bool(words.get("mlp_bias", False)),
            qk_norm=architecture.qk_norm,
            sliding_windows=_sliding_windows(words, architecture, num_layers),
            embedding_scale=hidden_size**0.5 if architecture.scales_embedding else 1.0,
            query_scale=number(words, "query_pre_attn_scalar", 0, 1e9, head_dim) ** -0.5,
            num_experts=num_experts,
            experts_per_token=experts_per_token,
        )


def _activation(words: Words) -> str:
    activation = words.get("hidden_act", "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"activation {activation!r:.80} is not supported; these are: {', '.join(ACTIVATIONS)}"
        )
    return str(activation)


def _experts(words: Words, architecture: Architecture) -> tuple[int, int]:
    if not architecture.has_experts:
        return 0, 0
    count = integer(words, "num_local_experts", MAX_EXPERTS, 8)
    return count, integer(words, "num_experts_per_tok", count, 2)


def _window_rope(
    words: Words, architecture: Architecture, context: int, head_dim: int
) -> RopeConfig | None:
    if not architecture.has_window_rope:
        return None
    return read_rope({"rope_parameters": words.get("window_rope_parameters")}, context, head_dim)


def _sliding_windows(
    words: Words, architecture: Architecture, num_layers: int
) -> tuple[int | None, ...]:
    uses = architecture.windows == "always" or (
        architecture.windows == "asks" and bool(words.get("use_sliding_window", False))
    )
    if words.get("sliding_window") is None or not uses:
        return (None,) * num_layers
    window = integer(words, "sliding_window", MAX_CONTEXT)
    kinds = words.get("layer_types")
    if kinds is None:
        first = words.get("max_window_layers", 28) if architecture.windows == "asks" else 0
        if type(first) is not int:
            raise WeightFileError(f"max_window_layers in the configuration is {first!r:.80}")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise WeightFileError(f"layer_types is {kinds!r:.80}; it must list {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)

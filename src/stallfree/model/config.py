"""What shape a model has: the Llama family as data.

Built from a `config.json` of Hugging Face (or the like of one, made from GGUF metadata). To add an
architecture that differs only in what `ModelConfig` holds, give it a line in `ARCHITECTURES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stallfree.errors import UnsupportedModelError, WeightFileError


@dataclass(frozen=True, slots=True)
class Traits:
    """How an architecture differs from Llama where its configuration does not say.

    Attributes:
        qkv_bias: q, k and v have biases; None asks the configuration's `attention_bias`.
        output_bias: the attention output has one; None as above.
        qk_norm: queries and keys are normalised per head.
        windows: sliding windows are used: "always", if the configuration "asks", or "never".
    """

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    qk_norm: bool = False
    windows: str = "never"


ARCHITECTURES: dict[str, Traits] = {
    "LlamaForCausalLM": Traits(),  # Llama 2 and 3, Yi and others
    "YiForCausalLM": Traits(qkv_bias=False, output_bias=False),
    "MistralForCausalLM": Traits(qkv_bias=False, output_bias=False, windows="always"),
    "Qwen2ForCausalLM": Traits(qkv_bias=True, output_bias=False, windows="asks"),
    "Qwen3ForCausalLM": Traits(qk_norm=True, windows="asks"),
}

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "freq_factors")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base, and how it is stretched to longer contexts.

    `parameters` are those of the scaling type, by their names in Hugging Face configurations;
    `factors` (type "freq_factors", from GGUF files) divide the frequencies one by one.
    """

    theta: float = 10_000.0
    rope_type: str = "default"
    parameters: Mapping[str, float] = field(default_factory=dict)
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder.

    Attributes:
        sliding_windows: for each layer, how many of the latest tokens a token attends to (itself
            included), or None for all.
        max_position_embeddings: context the model was made for, before any rope scaling.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]

    @property
    def max_context(self) -> int:
        """Longest context in tokens, rope scaling included."""
        factor = self.rope.parameters.get("factor", 1.0)
        base = float(self.max_position_embeddings)
        if self.rope.rope_type in ("linear", "dynamic"):
            base *= factor
        elif self.rope.rope_type == "yarn":
            original = self.rope.parameters.get("original_max_position_embeddings", base)
            base = max(base, original * factor)
        return int(base)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that the KV cache keeps of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face configuration.

        Raises:
            UnsupportedModelError: the architecture, activation or rope scaling is not implemented;
                names it and what is.
            WeightFileError: a value is missing or makes no sense.
        """
        architecture = _architecture(config)
        traits = ARCHITECTURES[architecture]
        activation = config.get("hidden_act", "silu")
        if activation != "silu":
            raise UnsupportedModelError(f"activation {activation!r}; only 'silu' is supported")
        num_heads = _positive(config, "num_attention_heads")
        hidden_size = _positive(config, "hidden_size")
        num_layers = _positive(config, "num_hidden_layers")
        num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
        head_dim = _positive(config, "head_dim", hidden_size // num_heads)
        if num_heads % num_kv_heads or head_dim % 2:
            raise WeightFileError(
                f"{num_heads} query heads of {head_dim} over {num_kv_heads} key heads: "
                "the heads must divide and their size must be even"
            )
        bias = bool(config.get("attention_bias", False))
        return cls(
            architecture=architecture,
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=_positive(config, "max_position_embeddings", 2048),
            rope=_rope(config),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias if traits.qkv_bias is None else traits.qkv_bias,
            output_bias=bias if traits.output_bias is None else traits.output_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=traits.qk_norm,
            sliding_windows=_sliding_windows(config, traits, num_layers),
        )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or [config.get("model_type", "unknown")]
    for name in names:
        if name in ARCHITECTURES:
            return str(name)
    raise UnsupportedModelError(
        f"architecture {', '.join(map(str, names))} is not supported; "
        f"these are: {', '.join(ARCHITECTURES)}"
    )


def _positive(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise WeightFileError(f"{name} in the model's configuration is {value!r}; it must be >= 1")
    return value


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", config.get("rope_theta", 10_000.0))
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope scaling {rope_type!r} is not supported; these are: {', '.join(ROPE_TYPES)}"
        )
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError("rotary embedding of a part of each head is not supported")
    numbers = {
        name: value
        for name, value in scaling.items()
        if isinstance(value, int | float) and name != "rope_theta"
    }
    if rope_type in ("linear", "dynamic", "llama3", "yarn") and "factor" not in numbers:
        raise WeightFileError(f"rope scaling {rope_type!r} has no factor")
    if rope_type in ("llama3", "yarn"):
        numbers.setdefault(
            "original_max_position_embeddings",
            config.get("original_max_position_embeddings")
            or _positive(config, "max_position_embeddings"),
        )
    factors = tuple(float(factor) for factor in scaling.get("factors", ()))
    return RopeConfig(float(theta), rope_type, numbers, factors)


def _sliding_windows(
    config: Mapping[str, Any], traits: Traits, num_layers: int
) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    uses = traits.windows == "always" or (
        traits.windows == "asks" and bool(config.get("use_sliding_window", False))
    )
    if window is None or not uses:
        return (None,) * num_layers
    if not isinstance(window, int) or window < 1:
        raise WeightFileError(f"sliding_window in the model's configuration is {window!r}")
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 0) if traits.windows == "asks" else 0
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if len(kinds) != num_layers:
        raise WeightFileError(f"{len(kinds)} layer_types for {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)

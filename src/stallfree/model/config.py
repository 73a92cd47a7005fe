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
    "LlamaForCausalLM": Traits(),  # Llama 2 and 3, Yi and others that use its name
    "MistralForCausalLM": Traits(qkv_bias=False, output_bias=False, windows="always"),
    "Qwen2ForCausalLM": Traits(qkv_bias=True, output_bias=False, windows="asks"),
    "Qwen3ForCausalLM": Traits(qk_norm=True, windows="asks"),
}

# What no model of today comes near; beyond it a file is broken or hostile.
MAX_LAYERS = 10_000
MAX_SIZE = 2**24
MAX_CONTEXT = 2**31

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
            raise UnsupportedModelError(f"activation {activation!r:.80}; only 'silu' is supported")
        num_heads = _integer(config, "num_attention_heads", MAX_SIZE)
        hidden_size = _integer(config, "hidden_size", MAX_SIZE)
        num_layers = _integer(config, "num_hidden_layers", MAX_LAYERS)
        num_kv_heads = _integer(config, "num_key_value_heads", MAX_SIZE, num_heads)
        head_dim = _integer(config, "head_dim", MAX_SIZE, hidden_size // num_heads)
        if num_heads % num_kv_heads or head_dim % 2:
            raise WeightFileError(
                f"{num_heads} query heads of {head_dim} over {num_kv_heads} key heads: "
                "the heads must divide and their size must be even"
            )
        bias = bool(config.get("attention_bias", False))
        context = _integer(config, "max_position_embeddings", MAX_CONTEXT, 2048)
        return cls(
            architecture=architecture,
            vocab_size=_integer(config, "vocab_size", MAX_SIZE),
            hidden_size=hidden_size,
            intermediate_size=_integer(config, "intermediate_size", MAX_SIZE),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_number(config, "rms_norm_eps", 0, 1, 1e-6),
            max_position_embeddings=context,
            rope=_rope(config, context, head_dim),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=bias if traits.qkv_bias is None else traits.qkv_bias,
            output_bias=bias if traits.output_bias is None else traits.output_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=traits.qk_norm,
            sliding_windows=_sliding_windows(config, traits, num_layers),
        )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or config.get("model_type", "unknown")
    listed = names if isinstance(names, list) else [names]
    for name in listed:
        if isinstance(name, str) and name in ARCHITECTURES:
            return name
    raise UnsupportedModelError(
        f"architecture {', '.join(map(str, listed)):.200} is not supported; "
        f"these are: {', '.join(ARCHITECTURES)}"
    )


def _integer(config: Mapping[str, Any], name: str, highest: int, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default
    if type(value) is not int or not 1 <= value <= highest:
        raise WeightFileError(
            f"{name} in the model's configuration is {value!r:.80}; it must be a whole number "
            f"from 1 to {highest}"
        )
    return value


def _number(
    config: Mapping[str, Any], name: str, above: float, highest: float, default: float | None = None
) -> float:
    value = config.get(name)
    if value is None:
        value = default
    if isinstance(value, int | float) and not isinstance(value, bool) and above < value <= highest:
        return float(value)
    raise WeightFileError(
        f"{name} in the model's configuration is {value!r:.80}; it must be a number above "
        f"{above} and at most {highest:g}"
    )


def _rope(config: Mapping[str, Any], context: int, head_dim: int) -> RopeConfig:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise WeightFileError(f"the rope scaling of the model is {scaling!r:.80}, not an object")
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(
            f"rope scaling {rope_type!r:.80} is not supported; these are: {', '.join(ROPE_TYPES)}"
        )
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError("rotary embedding of a part of each head is not supported")
    theta = _number({**config, **scaling}, "rope_theta", 1, 1e15, 10_000.0)
    if rope_type == "freq_factors":
        return RopeConfig(theta, rope_type, factors=_factors(scaling, head_dim))
    parameters = {}
    if rope_type in ("linear", "dynamic", "llama3", "yarn"):
        parameters["factor"] = _number(scaling, "factor", 0, 1e4)
    if rope_type in ("llama3", "yarn"):
        trained = {"original_max_position_embeddings": context, **_given(config), **_given(scaling)}
        parameters["original_max_position_embeddings"] = _integer(
            trained, "original_max_position_embeddings", MAX_CONTEXT
        )
    if rope_type == "llama3":
        low = parameters["low_freq_factor"] = _number(scaling, "low_freq_factor", 0, 1e4)
        parameters["high_freq_factor"] = _number(scaling, "high_freq_factor", low, 1e4)
    if rope_type == "yarn":
        for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            if scaling.get(name) is not None:
                parameters[name] = _number(scaling, name, 0, 1e4)
        parameters["truncate"] = bool(scaling.get("truncate", True))
    if rope_type == "dynamic" and head_dim < 4:
        raise WeightFileError(f"dynamic rope scaling needs heads of at least 4, not {head_dim}")
    return RopeConfig(theta, rope_type, parameters)


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say something."""
    return {name: value for name, value in config.items() if value is not None}


def _factors(scaling: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    factors = scaling.get("factors")
    if not isinstance(factors, list | tuple) or len(factors) != head_dim // 2:
        raise WeightFileError(f"rope scaling 'freq_factors' needs {head_dim // 2} factors")
    return tuple(_number({"rope factor": factor}, "rope factor", 0, 1e6) for factor in factors)


def _sliding_windows(
    config: Mapping[str, Any], traits: Traits, num_layers: int
) -> tuple[int | None, ...]:
    uses = traits.windows == "always" or (
        traits.windows == "asks" and bool(config.get("use_sliding_window", False))
    )
    if config.get("sliding_window") is None or not uses:
        return (None,) * num_layers
    window = _integer(config, "sliding_window", MAX_CONTEXT)
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 28) if traits.windows == "asks" else 0
        if type(first) is not int:
            raise WeightFileError(f"max_window_layers in the configuration is {first!r:.80}")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise WeightFileError(f"layer_types is {kinds!r:.80}; it must list {num_layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)

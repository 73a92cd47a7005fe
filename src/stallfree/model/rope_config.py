"""What a model's configuration says of rotary position embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stallfree.errors import UnsupportedModelError, WeightFileError
from stallfree.model.config_fields import MAX_CONTEXT, given, integer, number

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

    def longest(self, trained: int) -> int:
        """The longest context in tokens that it stretches a `trained` one to."""
        factor = self.parameters.get("factor", 1.0)
        base = float(trained)
        if self.rope_type in ("linear", "dynamic"):
            base *= factor
        elif self.rope_type == "yarn":
            original = self.parameters.get("original_max_position_embeddings", base)
            base = max(base, original * factor)
        return int(base)


def read_rope(config: Mapping[str, Any], context: int, head_dim: int) -> RopeConfig:
    """Read it from `rope_parameters`, or `rope_scaling` and `rope_theta`.

    Raises:
        UnsupportedModelError: the scaling is not implemented; names it and what is.
        WeightFileError: a value is missing or makes no sense.
    """
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
    theta = number({**config, **scaling}, "rope_theta", 1, 1e15, 10_000.0)
    if rope_type == "freq_factors":
        return RopeConfig(theta, rope_type, factors=_factors(scaling, head_dim))
    parameters = {}
    if rope_type in ("linear", "dynamic", "llama3", "yarn"):
        parameters["factor"] = number(scaling, "factor", 0, 1e4)
    if rope_type in ("llama3", "yarn"):
        trained = {"original_max_position_embeddings": context, **given(config), **given(scaling)}
        parameters["original_max_position_embeddings"] = integer(
            trained, "original_max_position_embeddings", MAX_CONTEXT
        )
    if rope_type == "llama3":
        low = parameters["low_freq_factor"] = number(scaling, "low_freq_factor", 0, 1e4)
        parameters["high_freq_factor"] = number(scaling, "high_freq_factor", low, 1e4)
    if rope_type == "yarn":
        for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            if scaling.get(name) is not None:
                parameters[name] = number(scaling, name, 0, 1e4)
        parameters["truncate"] = bool(scaling.get("truncate", True))
    if rope_type == "dynamic" and head_dim < 4:
        raise WeightFileError(f"dynamic rope scaling needs heads of at least 4, not {head_dim}")
    return RopeConfig(theta, rope_type, parameters)


def _factors(scaling: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    factors = scaling.get("factors")
    if not isinstance(factors, list | tuple) or len(factors) != head_dim // 2:
        raise WeightFileError(f"rope scaling 'freq_factors' needs {head_dim // 2} factors")
    return tuple(number({"rope factor": factor}, "rope factor", 0, 1e6) for factor in factors)

"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and their stretchings to long contexts.

The angle of a token depends on its position alone, never on what else is computed with it, so a
prompt may be cut into any chunks.
"""

from __future__ import annotations

import math

import torch

from stallfree.model.config import ModelConfig
from stallfree.model.rope_config import RopeConfig


class Rope:
    """The angles of a rotary embedding.

    Args:
        config: the model's shape.
        rope: one of its embeddings.
        max_positions: longest context in tokens; only dynamic scaling asks for it.
        device: where angles are computed.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: RopeConfig,
        max_positions: int,
        device: torch.device | str = "cpu",
    ) -> None:
        frequencies, self._scale = inverse_frequencies(config, rope, max_positions)
        self._frequencies = frequencies.to(device)

    def at(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Cosines and sines of `positions` int64 (T,).

        Returns:
            (T, 2, D): cosines, then sines, each half of a head repeated.
        """
        angles = positions.float()[:, None] * self._frequencies  # (T, D / 2)
        angles = torch.cat((angles, angles), dim=-1)
        return (torch.stack((angles.cos(), angles.sin()), dim=1) * self._scale).to(dtype)


def inverse_frequencies(
    config: ModelConfig, rope: RopeConfig, max_positions: int
) -> tuple[torch.Tensor, float]:
    """Radians per position for each pair of a head's values, and a factor on cosine and sine.

    Dynamic scaling (NTK-aware) is settled once, for the longest context the engine admits: were
    it to follow each request, keys already in the cache would carry other angles than new ones.

    Returns:
        float32 (D / 2,), and the factor.
    """
    dim = config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    theta = rope.theta
    if rope.rope_type == "dynamic":
        theta = _dynamic_theta(rope, dim, config.max_position_embeddings, max_positions)
    frequencies = 1.0 / theta**exponents
    match rope.rope_type:
        case "linear":
            return frequencies / rope.parameters["factor"], 1.0
        case "llama3":
            return _llama3(frequencies, rope), 1.0
        case "yarn":
            return _yarn(frequencies, rope, dim)
        case "freq_factors":
            return frequencies / torch.tensor(rope.factors, dtype=torch.float32), 1.0
        case _:
            return frequencies, 1.0


def _dynamic_theta(rope: RopeConfig, dim: int, trained: int, longest: int) -> float:
    factor = rope.parameters["factor"]
    stretch = factor * max(longest, trained) / trained - (factor - 1)
    return float(rope.theta * stretch ** (dim / (dim - 2)))


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: divide low frequencies, keep high ones, blend between."""
    low, high = rope.parameters["low_freq_factor"], rope.parameters["high_freq_factor"]
    turns = rope.parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / rope.parameters["factor"])


def _yarn(frequencies: torch.Tensor, rope: RopeConfig, dim: int) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): interpolate the slow dimensions only, and sharpen attention."""
    parameters = rope.parameters
    factor = parameters["factor"]
    trained = parameters["original_max_position_embeddings"]

    def dimension_turning(times: float) -> float:
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = dimension_turning(parameters.get("beta_fast") or 32)
    high = dimension_turning(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return frequencies * (1 - slow + slow / factor), _yarn_scale(rope)


def _yarn_scale(rope: RopeConfig) -> float:
    parameters = rope.parameters
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])

    def scale(weight: float) -> float:
        factor = parameters["factor"]
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight, weight_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(weight) / scale(weight_all) if weight and weight_all else scale(1.0)


def apply_rope(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate the heads `x` (T, H, D) by `angles` (T, 2, D), as `Rope.at` gives them."""
    cos, sin = angles[:, None, 0], angles[:, None, 1]  # (T, 1, D)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin

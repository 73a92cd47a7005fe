"""Rounding weights to int8, and whether this machine computes with them."""

from __future__ import annotations

import torch

from stallfree.model.config import ModelConfig

LEVELS = 127  # of 8 bits: whole numbers from -127 to 127
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a row's largest weight: what reaches the last level
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_AT_ONCE = 1 << 22  # weights: bounds the memory of trying


def is_supported() -> bool:
    """Whether this machine runs the int8 kernels: x86-64 with AVX2, PyTorch with libgomp."""
    from stallfree.kernels import openmp, processor

    return processor.HAS_AVX2 and openmp.AVAILABLE


def obstacle(config: ModelConfig) -> str | None:
    """What the int8 kernels do not compute of a model, in words; None if they compute all of it."""
    found = {
        "attention and MLP in parallel": config.is_parallel,
        "a mixture of experts": config.num_experts > 0,
        f"norms of the kind {config.norm!r}": config.norm not in ("rms", "rms + 1"),
        f"the activation {config.activation}": config.activation not in _ACTIVATIONS,
        "an MLP without a gate": not config.is_gated,
        "q, k and v in one matrix": config.names.fused_qkv is not None,
    }
    return ", ".join(what for what, is_there in found.items() if is_there) or None


def weight_levels() -> int:
    """The largest whole number that a weight may be for this processor's kernels."""
    from stallfree.kernels.int8_matmul import WEIGHT_LEVELS

    return WEIGHT_LEVELS


def quantize_rows(weight: torch.Tensor, levels: int = LEVELS) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of `weight` float (out, in) to int8 at a scale of its own.

    The scale is the one of a few with the least sum of squared errors: finer steps for many weights
    can be worth more than the few largest, which are then cut.

    Args:
        weight: what is rounded.
        levels: the largest whole number, at most 127.

    Returns:
        int8 (out, in), and the scales float32 (out,) that give the weight back.
    """
    rows = max(1, _AT_ONCE // weight.shape[1])
    parts = [_quantize_some(some.float(), levels) for some in weight.split(rows)]
    values, scales = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(scales)


def _quantize_some(weight: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    most = weight.abs().amax(dim=1).clamp_min(1e-12) / levels
    best, scales, least = torch.empty(()), most, torch.full_like(most, torch.inf)
    for share in _SHARES:
        tried = most * share
        values = (weight / tried[:, None]).round_().clamp_(-levels, levels)
        errors = (values * tried[:, None]).sub_(weight).square_().sum(dim=1)
        is_better = errors < least
        best = torch.where(is_better[:, None], values, best)
        scales, least = torch.where(is_better, tried, scales), torch.minimum(least, errors)
    return best.to(torch.int8), scales

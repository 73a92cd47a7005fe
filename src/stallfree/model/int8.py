"""Rounding weights to int8, and whether this machine computes with them."""

from __future__ import annotations

import torch

LEVELS = 127  # of 8 bits: whole numbers from -127 to 127


def is_supported() -> bool:
    """Whether this machine runs the int8 kernels: x86-64 with AVX2, PyTorch with libgomp."""
    from stallfree.kernels import openmp, processor

    return processor.HAS_AVX2 and openmp.AVAILABLE


def weight_levels() -> int:
    """The largest whole number that a weight may be for this processor's kernels."""
    from stallfree.kernels.int8_matmul import WEIGHT_LEVELS

    return WEIGHT_LEVELS


def quantize_rows(weight: torch.Tensor, levels: int = LEVELS) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of `weight` float (out, in) to int8 at a scale of its own.

    Args:
        weight: what is rounded.
        levels: the largest whole number, at most 127.

    Returns:
        int8 (out, in), and the scales float32 (out,) that give the weight back.
    """
    scales = weight.abs().amax(dim=1).clamp_min(1e-12) / levels
    return (weight / scales[:, None]).round_().to(torch.int8), scales

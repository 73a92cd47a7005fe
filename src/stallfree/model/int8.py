"""Rounding weights to int8, and whether this machine computes with them."""

from __future__ import annotations

import torch

_LEVELS = 127  # quantized values are whole numbers from -127 to 127


def is_supported() -> bool:
    """Whether this machine runs the int8 kernels: x86-64 with AVX2, PyTorch with libgomp."""
    from stallfree.kernels import openmp, processor

    return processor.HAS_AVX2 and openmp.AVAILABLE


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of `weight` float (out, in) to int8 at a scale of its own.

    Returns:
        int8 (out, in), and the scales float32 (out,) that give the weight back.
    """
    scales = weight.abs().amax(dim=1).clamp_min(1e-12) / _LEVELS
    return (weight / scales[:, None]).round_().to(torch.int8), scales

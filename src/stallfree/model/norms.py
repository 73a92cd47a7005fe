"""The norms of the architectures."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# (..., size) -> (..., size)
Norm = Callable[[torch.Tensor], torch.Tensor]


def make_norm(kind: str, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> Norm:
    """A norm over the last dimension.

    Args:
        kind: "rms" divides by the root of the mean square (arXiv 1910.07467); "rms + 1" also, and
            has a weight that 1 is added to, in float32 (Gemma); "layer" takes off the mean first.
        weight: (size,).
        bias: (size,), or None; only "layer" has one.
        eps: added to what the root is taken of.
    """
    shape = weight.shape
    if kind == "layer":
        return lambda x: F.layer_norm(x, shape, weight, bias, eps)
    if kind == "rms + 1":
        weight = 1 + weight.float()
        return lambda x: F.rms_norm(x.float(), shape, weight, eps).to(x.dtype)
    return lambda x: F.rms_norm(x, shape, weight, eps)


def no_norm(x: torch.Tensor) -> torch.Tensor:
    """What stands where an architecture has no norm."""
    return x

"""int8 arithmetic on CPUs: weights scaled per output channel, activations per row.

Sums are exact in int32, so the result of a row does not depend on the rows beside it. The kernels
are PyTorch's FBGEMM operators; where they are not supported, `is_supported` says so.
"""

from __future__ import annotations

import warnings

import torch

_LEVELS = 127  # quantized values are whole numbers from -127 to 127


def is_supported() -> bool:
    """Whether this machine has the int8 kernels (x86-64 with AVX2 or better)."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of `weight` float (out, in) to int8 at a scale of its own.

    Returns:
        int8 (out, in), and the scales float32 (out,) that give the weight back.
    """
    scales = weight.abs().amax(dim=1).clamp_min(1e-12) / _LEVELS
    return (weight / scales[:, None]).round_().to(torch.int8), scales


class Int8Linear:
    """A linear layer of int8 weights on a CPU.

    Args:
        weight: int8 (out, in).
        scales: float32 (out,).
        bias: float32 (out,), or None.
    """

    def __init__(
        self, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        # Without VNNI the kernel adds pairs of products in 16 bits; 7-bit activations cannot
        # overflow that, so sums are exact on every machine.
        self._levels = (
            _LEVELS if torch.cpu.get_capabilities().get("avx512_vnni", False) else _LEVELS // 2
        )
        self._bias = bias
        torch.backends.quantized.engine = "fbgemm"
        with warnings.catch_warnings():  # PyTorch plans to move these operators elsewhere
            warnings.simplefilter("ignore")
            quantized = torch._make_per_channel_quantized_tensor(
                weight, scales.double(), torch.zeros(len(scales), dtype=torch.int64), 0
            )
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rows float32 (T, in) to rows (T, out)."""
        largest = x.abs().amax(dim=-1, keepdim=True).clamp_min_(1e-12)
        out = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / largest, 1 / self._levels, self._levels + 1, self._packed
        )
        out *= largest
        return out if self._bias is None else out.add_(self._bias)


class Int8Embedding:
    """A table of int8 rows, each with its scale."""

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor) -> None:
        self._weight = weight
        self._scales = scales

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Rows float32 (T, hidden) of `token_ids` int64 (T,)."""
        return self._weight[token_ids].float() * self._scales[token_ids, None]

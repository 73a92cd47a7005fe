"""Linear layers of floats, and the choice of the kernels that run them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

# (T, in) -> (T, out)
Linear = Callable[[torch.Tensor], torch.Tensor]

PACKED_ROWS = 48  # the rows that oneDNN lays a packed weight out for; others run too


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
    """A linear layer of `weight` (out, in) and `bias` (out,).

    In float32 on a CPU the weight is reordered for oneDNN once, which is 1.5 to 3 times as fast
    as `F.linear` between 1 and 64 rows (docs/log.md). The reordered weight is a copy; `weight`
    itself is needed no more.
    """
    if keeps_copy(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def keeps_copy(weight: torch.Tensor) -> bool:
    """Whether `make_linear` keeps `weight` in another form, beside what the caller holds."""
    is_float32_on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_float32_on_cpu and bool(torch.backends.mkldnn.is_available())

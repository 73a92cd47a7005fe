"""Linear layers and embeddings, and the choice of the kernels that run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stallfree.model.int8 import Int8Embedding, Int8Linear

# (T, in) -> (T, out)
Linear = Callable[[torch.Tensor], torch.Tensor]
# int64 (T,) -> (T, hidden)
Embedding = Callable[[torch.Tensor], torch.Tensor]

PACKED_ROWS = 48  # the rows that oneDNN lays a packed weight out for; others run too


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight (out, in): floats, or int8 with `scales` float32 (out,)."""

    values: torch.Tensor
    scales: torch.Tensor | None = None


def stack(matrices: Sequence[Matrix]) -> Matrix:
    """One matrix of several with the same input, one under the other."""
    if len(matrices) == 1:
        return matrices[0]
    scales = [matrix.scales for matrix in matrices if matrix.scales is not None]
    return Matrix(
        torch.cat([matrix.values for matrix in matrices]), torch.cat(scales) if scales else None
    )


def make_linear(weight: Matrix, bias: torch.Tensor | None = None) -> Linear:
    """A linear layer of `weight` and `bias` (out,).

    In float32 on a CPU the weight is reordered for oneDNN once, which is 1.5 to 3 times as fast
    as `F.linear` between 1 and 64 rows (docs/log.md). The reordered weight is a copy; `weight`
    itself is needed no more.
    """
    values = weight.values
    if weight.scales is not None:
        return Int8Linear(values, weight.scales, bias)
    if keeps_copy(weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(values, PACKED_ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, values, bias)


def make_embedding(weight: Matrix) -> Embedding:
    """A table whose rows are those of `weight` (vocabulary, hidden)."""
    if weight.scales is not None:
        return Int8Embedding(weight.values, weight.scales)
    values = weight.values
    return lambda token_ids: F.embedding(token_ids, values)


def keeps_copy(weight: Matrix) -> bool:
    """Whether `make_linear` keeps `weight` in another form, beside what the caller holds."""
    if weight.scales is not None:
        return True
    is_float32_on_cpu = weight.values.device.type == "cpu" and weight.values.dtype == torch.float32
    return is_float32_on_cpu and bool(torch.backends.mkldnn.is_available())

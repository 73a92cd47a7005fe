"""Linear layers by themselves: the int8 kernel, and beside it what PyTorch has.

Weights are so many that those of a call are no longer in a cache. Rows go in and come out as
floats, so their rounding counts. A kernel multiplies them by several matrices one after the other,
ours in one parallel region as in a model, and the time of one is the mean.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from steps import SCALE_BYTES, Bounds, seconds

from stallfree.kernels import phases, shapes
from stallfree.kernels.int8_matmul import PANEL, padded
from stallfree.kernels.ir import LANES
from stallfree.kernels.jit import compiled, entry
from stallfree.kernels.openmp import parallel
from stallfree.model.int8_decoder import Int8Decoder
from stallfree.model.linear import make_linear

OURS = "int8"
NAMES = (OURS, "FBGEMM int8", "oneDNN float32", "F.linear float32")
BURSTS = 3  # in a round
BURST_OPERATIONS = 1e10  # a burst goes through many matrices with few rows, through few with many
MAX_MATRICES = 24

# rows, and the indices of the matrices that they are multiplied by
Multiply = Callable[[torch.Tensor, range], object]


@compiled
def _multiply(thread, threads, product, first, stop, rows, x, out, scratch):  # type: ignore[no-untyped-def]
    team = shapes.Team(thread, threads)
    width, outputs = product.weights.shape[2] // PANEL, product.scales.shape[1]
    base = 0
    for number in range(first, stop):
        base = phases.quantize_rows(team, base, rows, x, width, scratch)
        matrix = phases.of_layer(product, number % product.weights.shape[0])
        base = phases.multiply(team, base, rows, matrix, phases.STORE, out, 0, outputs, scratch)


@entry
def multiply(threads, product, first, stop, rows, x, out, scratch):  # type: ignore[no-untyped-def]
    """Rows of floats `x` times matrices of a product, from number `first` on, into `out`."""
    scratch.counter[0] = 0
    parallel(_multiply, threads, (product, first, stop, rows, x, out, scratch))


def measure_linear(
    decoder: Int8Decoder,
    shape: tuple[int, int],
    row_counts: Sequence[int],
    *,
    weight_bytes: int,
    rounds: int,
    bounds: Bounds,
) -> list[dict[str, Any]]:
    """Time all kernels on one shape in turn.

    Args:
        decoder: whose threads and scratch memory the int8 kernel uses.
        shape: outputs and inputs.
        row_counts: how many rows to multiply.
        weight_bytes: of the int8 matrices, together; those of floats take four times as much.
        rounds: how often to go through everything.
        bounds: measured in each round.

    Returns:
        For each number of rows and kernel: rows, kernel, min_ms and median_ms.
    """
    count = max(1, weight_bytes // (shape[0] * shape[1]))
    kernels = [*_int8(decoder, shape, count, max(row_counts)), *_floats(shape, count)]
    nexts = dict.fromkeys(NAMES, 0)
    times: dict[tuple[int, str], list[float]] = {(r, n): [] for r in row_counts for n in NAMES}
    inputs = {rows: torch.randn(rows, shape[1]) for rows in row_counts}
    for number in range(rounds + 1):
        if number:  # the first is for warming up
            bounds.measure()
        for rows, x in inputs.items():
            wanted = BURST_OPERATIONS / (2 * rows * shape[0] * shape[1])
            size = max(1, min(MAX_MATRICES, int(wanted)))
            for name, kernel in zip(NAMES, kernels, strict=True):
                for _ in range(BURSTS if number and size > 1 else 1):
                    indices = range(nexts[name], nexts[name] + size)
                    nexts[name] += size
                    time_s = seconds(partial(kernel, x, indices)) / size
                    if number:
                        times[rows, name].append(time_s)
    return [
        {
            "rows": rows,
            "kernel": name,
            "min_ms": min(some) * 1000,
            "median_ms": statistics.median(some) * 1000,
        }
        for (rows, name), some in times.items()
    ]


def costs_of(shape: tuple[int, int], rows: int) -> tuple[int, int]:
    """Bytes of the int8 matrix and its scales, and operations."""
    outputs, inputs = shape
    return outputs * (inputs + SCALE_BYTES), 2 * rows * outputs * inputs


def _int8(
    decoder: Int8Decoder, shape: tuple[int, int], count: int, most_rows: int
) -> Iterator[Multiply]:
    """Ours and FBGEMM's."""
    outputs, inputs = shape
    panels, width = padded(outputs, PANEL) // PANEL, padded(inputs, LANES)
    product = shapes.Product(
        weights=_random_int8(count, panels, width * PANEL).numpy(),
        scales=torch.rand(count, panels * PANEL).numpy(),
        column_sums=torch.zeros(count, panels * PANEL, dtype=torch.int32).numpy(),
        bias=torch.zeros(count, 0).numpy(),
    )
    decoder._reserve(most_rows, 0)
    threads, scratch = decoder._threads, decoder._scratch
    out = torch.zeros(most_rows * panels * PANEL).numpy()

    def ours(x: torch.Tensor, indices: range) -> None:
        flat = F.pad(x, (0, width - inputs)).reshape(-1).numpy()
        multiply(threads, product, indices.start, indices.stop, len(x), flat, out, scratch)

    yield ours
    packed = [_pack(_random_int8(outputs, inputs)) for _ in range(count)]
    product_of = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    yield _one_by_one(lambda x, i: product_of(x, 1 / 32, 128, packed[i % count]))


def _floats(shape: tuple[int, int], count: int) -> Iterator[Multiply]:
    """OneDNN's with reordered weights, and PyTorch's choice without."""
    weights = [torch.randn(shape) for _ in range(count)]
    linears = [make_linear(weight) for weight in weights]
    yield _one_by_one(lambda x, i: linears[i % count](x))
    yield _one_by_one(lambda x, i: F.linear(x, weights[i % count]))


def _one_by_one(call: Callable[[torch.Tensor, int], object]) -> Multiply:
    def multiply_all(x: torch.Tensor, indices: range) -> None:
        for index in indices:
            call(x, index)

    return multiply_all


def _random_int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def _pack(weight: torch.Tensor) -> Any:
    """An int8 weight as FBGEMM takes it."""
    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():  # PyTorch plans to move these operators elsewhere
        warnings.simplefilter("ignore")
        scales, zeros = torch.full((len(weight),), 0.01), torch.zeros(len(weight))
        quantized = torch._make_per_channel_quantized_tensor(
            weight, scales.double(), zeros.long(), 0
        )
        return torch.ops.quantized.linear_prepack(quantized, None)

"""What timings are to be compared with: reading memory, and products by well-known kernels.

python benchmarks/machine.py
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch

from stallfree.model.linear import make_linear

READ_BYTES = 1 << 28  # far beyond the caches
ROWS, INPUTS, OUTPUTS = 512, 896, 4864  # of a layer of the demo model
REPEATS = 10


def read_bandwidth() -> float:
    """Bytes per second that all threads of PyTorch read from memory together.

    The best of a few sums over 256 MiB.
    """
    values = torch.ones(READ_BYTES // 4)
    return READ_BYTES / _best_seconds(values.sum)


def int8_rate() -> float:
    """Operations per second of int8 matrix products, a multiplication and an addition as two.

    The best of a few products of 512 rows and weights of 896 x 4864 by PyTorch's FBGEMM kernel,
    its rounding of the rows included. A reference: other kernels may be faster on this machine.
    """
    torch.backends.quantized.engine = "fbgemm"
    with warnings.catch_warnings():  # PyTorch plans to move these operators elsewhere
        warnings.simplefilter("ignore")
        weight = torch._make_per_channel_quantized_tensor(
            torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8),
            torch.full((OUTPUTS,), 0.01, dtype=torch.float64),
            torch.zeros(OUTPUTS, dtype=torch.int64),
            0,
        )
        packed = torch.ops.quantized.linear_prepack(weight, None)
    rows = torch.rand(ROWS, INPUTS)
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    seconds = _best_seconds(lambda: product(rows, 1 / 127, 128, packed))
    return 2 * ROWS * INPUTS * OUTPUTS / seconds


def float_rate() -> float:
    """Operations per second of float32 matrix products: as `int8_rate`, by oneDNN.

    Its weights are reordered; without oneDNN, PyTorch chooses the kernel.
    """
    linear, rows = make_linear(torch.rand(OUTPUTS, INPUTS)), torch.rand(ROWS, INPUTS)
    return 2 * ROWS * INPUTS * OUTPUTS / _best_seconds(lambda: linear(rows))


def _best_seconds(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    print(
        f"{read_bandwidth() / 1e9:.1f} GB/s read, {int8_rate() / 1e9:.0f} GOP/s FBGEMM int8, "
        f"{float_rate() / 1e9:.0f} GOP/s oneDNN float32"
    )

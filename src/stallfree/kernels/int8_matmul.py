"""Matrix products of int8 weights and rows of quantized activations, with exact int32 sums.

Weights lie in panels of 64 outputs, activations in groups of 6 rows, both with four consecutive
inputs together, as the processor's dot product of bytes wants them: weights [outputs / 64]
[inputs / 4][64][4], activations [rows / 6][inputs / 4][6][4]. A tile of 6 rows by 64 outputs stays
in registers over all inputs, so each weight is read from memory once for many rows.

Activations are unsigned, 128 more than their value; what that adds to a sum is known per output
and taken off. Without VNNI, pairs of products are added in 16 bits: activations then have 7 bits,
which cannot overflow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stallfree.kernels.ir import (
    I8,
    I16,
    I32,
    I32X16,
    I64,
    LANES,
    Loop,
    call,
    data_of,
    load,
    offset,
    splat,
    store,
)
from stallfree.kernels.jit import compiled, entry, inlined
from stallfree.kernels.openmp import parallel
from stallfree.kernels.processor import HAS_AVX512, HAS_VNNI
from stallfree.kernels.simd import fill, load_ints
from stallfree.kernels.simd import load as load_vector

ROWS = 6  # of a tile, and of a group of activations
VECTORS = 4
PANEL = VECTORS * LANES  # outputs of a tile
DEPTH = 4  # inputs that lie together
LEVELS = 127 if HAS_VNNI else 63  # activations are whole numbers from -LEVELS to LEVELS
UNIT_GROUPS = 40  # groups of rows that a thread takes at once, so that weights stay in its cache


def padded(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def pack(weight: torch.Tensor, width: int, out: torch.Tensor) -> None:
    """Lay an int8 weight (outputs, inputs) out for the kernels.

    Args:
        weight: its outputs a multiple of 64.
        width: what inputs are padded to, with zeros.
        out: int8 (panels, width * 64), gets the panels.
    """
    outputs, inputs = weight.shape
    if width > inputs:
        weight = torch.nn.functional.pad(weight, (0, width - inputs))
    quads = weight.contiguous().view(torch.int32).view(outputs // PANEL, PANEL, width // DEPTH)
    out.view(torch.int32).view(len(out), width // DEPTH, PANEL).copy_(quads.transpose(1, 2))


def _make_tile(rows: int) -> Any:
    """A function that multiplies `rows` rows of a group with a panel."""
    at_once = VECTORS if HAS_AVX512 else max(1, ROWS // rows)  # as registers allow

    @intrinsic
    def tile(
        typing: Any, group: Any, group_at: Any, panel: Any, panel_at: Any, steps: Any, sums: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            arrays = [data_of(context, builder, signature.args[i], values[i]) for i in (0, 2, 5)]
            activations = offset(builder, arrays[0], values[1])
            weights = offset(builder, arrays[1], values[3])
            for first in range(0, VECTORS, at_once):
                vectors = range(first, min(first + at_once, VECTORS))
                _multiply(builder, rows, vectors, activations, weights, values[4], arrays[2])
            return context.get_dummy_value()

        return (
            types.none(group, types.intp, panel, types.intp, types.intp, sums),
            generate,
        )

    return tile


def _multiply(
    builder: Any,
    rows: int,
    vectors: range,
    activations: Any,
    weights: Any,
    steps: Any,
    sums: Any,
) -> None:
    """Emit the tile of the first `rows` rows and these vectors of a panel's outputs."""
    loop = Loop(builder, steps, [ir.Constant(I32X16, None)] * (rows * len(vectors)))
    a = offset(builder, activations, builder.mul(loop.index, I64(ROWS * DEPTH)))
    w = offset(builder, weights, builder.mul(loop.index, I64(PANEL * DEPTH)))
    columns = [
        load(builder, offset(builder, w, v * LANES * DEPTH), I32X16, align=64) for v in vectors
    ]
    carried = iter(loop.values)
    made = []
    for row in range(rows):
        four = splat(builder, load(builder, offset(builder, a, row * DEPTH), I32))
        made += [_dot(builder, next(carried), four, column) for column in columns]
    done = iter(loop.close(made))
    for row in range(rows):
        for v in vectors:
            place = offset(builder, sums, (row * VECTORS + v) * LANES)
            store(builder, next(done), place, align=64)


def _dot(builder: Any, sums: Any, activations: Any, weights: Any) -> Any:
    """`sums` + products of four unsigned and four signed bytes in each of 16 lanes."""
    if HAS_VNNI:
        name = "llvm.x86.avx512.vpdpbusd.512"
        return call(builder, name, I32X16, sums, activations, weights)
    halves = []
    for first in (0, 8):
        order = ir.Constant(ir.VectorType(I32, 8), list(range(first, first + 8)))
        a, w = (
            builder.bitcast(builder.shuffle_vector(x, x, order), ir.VectorType(I8, 32))
            for x in (activations, weights)
        )
        words = ir.VectorType(I16, 16)
        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", words, a, w)
        ones = ir.Constant(words, [1] * 16)
        halves.append(call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), pairs, ones))
    both = ir.Constant(I32X16, list(range(16)))
    return builder.add(sums, builder.shuffle_vector(*halves, both))


_tile1, _tile2, _tile4, _tile6 = (_make_tile(rows) for rows in (1, 2, 4, ROWS))


@inlined
def multiply_tile(rows, activations, group, weights, panel, steps, sums):
    """Products of the first `rows` rows of a group with a panel into `sums` int32 (6 * 64,)."""
    group_at = group * steps * (ROWS * DEPTH)
    if rows > 4:
        _tile6(activations, group_at, weights[panel], 0, steps, sums)
    elif rows > 2:
        _tile4(activations, group_at, weights[panel], 0, steps, sums)
    elif rows > 1:
        _tile2(activations, group_at, weights[panel], 0, steps, sums)
    else:
        _tile1(activations, group_at, weights[panel], 0, steps, sums)


@inlined
def dequantized(sums, row, vector, row_scale, matrix, panel_at):
    """16 outputs of a row of a tile as floats, of the panel whose outputs begin at `panel_at`.

    Args:
        matrix: with `scales`, `corrections` and `bias`, see `layers.Product`.
    """
    column = panel_at + vector * LANES
    exact = load_ints(sums, row * PANEL + vector * LANES, matrix.corrections, column)
    value = exact * (fill(row_scale) * load_vector(matrix.scales, column))
    if matrix.bias.size:
        value = value + load_vector(matrix.bias, column)
    return value


@compiled
def _sum_columns(thread, threads, weights, ones, sums, out):
    steps = weights.shape[1] // (PANEL * DEPTH)
    for panel in range(thread, weights.shape[0], threads):
        multiply_tile(1, ones, 0, weights, panel, steps, sums[thread])
        for i in range(PANEL):
            out[panel * PANEL + i] = sums[thread, i] * (LEVELS + 1)


@entry
def _add_up(threads, weights, ones, sums, out):
    parallel(_sum_columns, threads, (weights, ones, sums, out))


def corrections_of(threads: int, weights: np.ndarray) -> np.ndarray:
    """What unsigned activations add to the sums of packed weights: int32 (outputs,)."""
    panels, size = weights.shape
    ones = np.ones(size // PANEL * ROWS, dtype=np.uint8)
    sums = torch.empty((threads, ROWS * PANEL), dtype=torch.int32).numpy()  # aligned
    out = np.empty(panels * PANEL, dtype=np.int32)
    _add_up(threads, weights, ones, sums, out)
    return out

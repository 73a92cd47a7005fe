"""Matrix products of int8 weights and rows of quantized activations, with exact int32 sums.

Weights lie in panels of 64 outputs, those in strips of as many outputs as registers can hold sums
of; activations lie in groups of ROWS. Both have four consecutive inputs together, as the
processor's dot product of bytes wants them: weights [outputs / STRIP][inputs / 4][STRIP][4],
activations [rows / ROWS][inputs / 4][ROWS][4]. The sums of a strip, for a block of rows, stay in
registers over all inputs; each weight comes from memory once for all rows of a group.

Activations are unsigned: 255 levels reach from a row's least value to its largest, so each row has
a number of its own that stands for zero. What that adds to a sum is this number times the sum of an
output's weights, and is taken off. Without VNNI, pairs of products are added in 16 bits: weights
then have 7 bits, so that nothing overflows. (Activations of 7 bits cost more: see docs/log.md.)
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, NamedTuple

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
    prefetch,
    splat,
    store,
)
from stallfree.kernels.jit import compiled, entry, inlined
from stallfree.kernels.openmp import parallel
from stallfree.kernels.processor import HAS_AVX512, HAS_VNNI
from stallfree.kernels.simd import fill, load_ints
from stallfree.kernels.simd import load as load_vector

ROWS = 6 if HAS_AVX512 else 8  # of a tile, and of a group of activations
BLOCK_ROWS = 6 if HAS_AVX512 else 4  # of a tile, whose sums the registers hold
_FETCHES = not HAS_AVX512  # measured: there the processor's own guesses are as good
HEIGHTS = (1, 2, 4, 6) if HAS_AVX512 else tuple(range(1, ROWS + 1))  # of tiles
VECTORS = 4
PANEL = VECTORS * LANES  # outputs of a tile
STRIP = PANEL if HAS_AVX512 else LANES  # outputs that lie together
DEPTH = 4  # inputs that lie together
LEVELS = 254  # steps from the least activation of a row to its largest: with rounding, 255
WEIGHT_LEVELS = 127 if HAS_VNNI else 63  # weights, from -WEIGHT_LEVELS to WEIGHT_LEVELS
MAX_INPUTS = (2**31 - 1) // (255 * WEIGHT_LEVELS)  # beyond, an exact sum may not fit in 32 bits
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
    inputs = weight.shape[1]
    if width > inputs:
        weight = torch.nn.functional.pad(weight, (0, width - inputs))
    quads = weight.contiguous().view(torch.int32).view(-1, STRIP, width // DEPTH)
    out.view(torch.int32).view(-1, width // DEPTH, STRIP).copy_(quads.transpose(1, 2))


@intrinsic
def _tile(
    typing: Any,
    rows: Any,
    group: Any,
    group_at: Any,
    panel: Any,
    steps: Any,
    hop: Any,
    sums: Any,
) -> Any:
    """Products of the first `rows` rows of a group with a panel: code for each height of a tile."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        arrays = [data_of(context, builder, signature.args[i], values[i]) for i in (1, 3, 6)]
        activations = offset(builder, arrays[0], values[2])
        after = builder.append_basic_block("multiplied")
        blocks = [builder.append_basic_block(f"rows{height}") for height in HEIGHTS]
        switch = builder.switch(values[0], blocks[-1])
        for rows in range(1, ROWS):
            switch.add_case(I64(rows), blocks[bisect_left(HEIGHTS, rows)])
        for height, block in zip(HEIGHTS, blocks, strict=True):
            builder.position_at_end(block)
            _multiply(builder, height, activations, arrays[1], values[4], values[5], arrays[2])
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    numbers = types.intp
    return types.none(numbers, group, numbers, panel, numbers, numbers, sums), generate


def _multiply(
    builder: Any, height: int, activations: Any, weights: Any, steps: Any, hop: Any, sums: Any
) -> None:
    """Emit the tile of `height` rows: some vectors of outputs at once, for a few rows at once."""
    at_once = VECTORS if HAS_AVX512 else {1: VECTORS, 2: 2}.get(height, 1)  # as registers allow
    row_blocks = [
        range(first, min(first + BLOCK_ROWS, height)) for first in range(0, height, BLOCK_ROWS)
    ]
    for first in range(0, VECTORS, at_once):
        vectors = range(first, first + at_once)
        for part, rows in enumerate(row_blocks):
            ahead = _Ahead(part, len(row_blocks), hop) if _FETCHES and height > 1 else None
            _multiply_block(builder, rows, vectors, activations, weights, steps, sums, ahead)


class _Ahead(NamedTuple):
    """Weights to ask for while others are used: those of the next vectors, or of the next panel.

    Each block of rows asks for its part, so that memory is as busy under the last block, whose
    weights are in the cache, as under the first.

    Attributes:
        part, parts: which of how many.
        hop: bytes from this panel to the next.
    """

    part: int
    parts: int
    hop: Any

    def fetch(self, builder: Any, vectors: range, weights: Any, steps: Any, index: Any) -> None:
        """Emit what turn `index` of a loop over `steps` asks for."""
        strip = builder.mul(steps, I64(STRIP * DEPTH))  # bytes
        place = builder.mul(builder.udiv(strip, I64(self.parts)), I64(self.part))
        place = builder.add(place, builder.mul(index, I64(STRIP * DEPTH // self.parts)))
        is_end = vectors.stop == VECTORS
        if is_end:
            place = builder.add(place, self.hop)
        first = 0 if is_end else vectors.stop
        for vector in range(first, first + len(vectors)):
            at = builder.add(place, builder.mul(strip, I64(vector)))
            prefetch(builder, offset(builder, weights, at))


def _multiply_block(
    builder: Any,
    rows: range,
    vectors: range,
    activations: Any,
    weights: Any,
    steps: Any,
    sums: Any,
    ahead: _Ahead | None,
) -> None:
    """Emit products whose sums stay in registers: of these rows and these vectors of outputs."""
    loop = Loop(builder, steps, [ir.Constant(I32X16, None)] * (len(rows) * len(vectors)))
    a = offset(builder, activations, builder.mul(loop.index, I64(ROWS * DEPTH)))
    w = offset(builder, weights, builder.mul(loop.index, I64(STRIP * DEPTH)))
    columns = []
    for v in vectors:
        strip, lane = divmod(v * LANES, STRIP)
        start = builder.mul(steps, I64(strip * STRIP * DEPTH))
        place = offset(builder, w, builder.add(start, I64(lane * DEPTH)))
        columns.append(load(builder, place, I32X16, align=64))
    if ahead is not None:
        ahead.fetch(builder, vectors, weights, steps, loop.index)
    carried = iter(loop.values)
    made = []
    for row in rows:
        four = splat(builder, load(builder, offset(builder, a, row * DEPTH), I32))
        made += [_dot(builder, next(carried), four, column) for column in columns]
    done = iter(loop.close(made))
    for row in rows:
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


@compiled
def multiply_tile(rows, activations, group, weights, panel, steps, hop, sums):
    """Products of the first `rows` rows of a group with a panel into `sums` int32 (ROWS * 64,).

    Args:
        steps: inputs / 4.
        hop: panels from this one to the next that the thread will probably take.
    """
    group_at = group * steps * (ROWS * DEPTH)
    hop_bytes = hop * steps * (PANEL * DEPTH)
    _tile(rows, activations, group_at, weights[panel], steps, hop_bytes, sums)


@inlined
def dequantized(sums, row, vector, row_scale, row_zero, matrix, panel_at):
    """16 outputs of a row of a tile as floats, of the panel whose outputs begin at `panel_at`.

    Args:
        matrix: with `scales`, `column_sums` and `bias`, see `shapes.Product`.
    """
    column = panel_at + vector * LANES
    exact = load_ints(sums, row * PANEL + vector * LANES, matrix.column_sums, column, row_zero)
    value = exact * (fill(row_scale) * load_vector(matrix.scales, column))
    if matrix.bias.size:
        value = value + load_vector(matrix.bias, column)
    return value


@compiled
def _sum_columns(thread, threads, weights, ones, sums, out):
    steps = weights.shape[1] // (PANEL * DEPTH)
    for panel in range(thread, weights.shape[0], threads):
        multiply_tile(1, ones, 0, weights, panel, steps, threads, sums[thread])
        for i in range(PANEL):
            out[panel * PANEL + i] = sums[thread, i]


@entry
def _add_up(threads, weights, ones, sums, out):
    parallel(_sum_columns, threads, (weights, ones, sums, out))


def column_sums_of(threads: int, weights: np.ndarray) -> np.ndarray:
    """What the packed weights of each output add up to: int32 (outputs,)."""
    panels, size = weights.shape
    ones = np.ones(size // PANEL * ROWS, dtype=np.uint8)
    sums = torch.empty((threads, ROWS * PANEL), dtype=torch.int32).numpy()  # aligned
    out = np.empty(panels * PANEL, dtype=np.int32)
    _add_up(threads, weights, ones, sums, out)
    return out

"""What happens to single rows between the matrix products."""

from __future__ import annotations

import numpy as np

from stallfree.kernels.attention import merge
from stallfree.kernels.int8_matmul import DEPTH, LEVELS, PANEL, ROWS, STRIP
from stallfree.kernels.ir import LANES
from stallfree.kernels.jit import compiled, inlined
from stallfree.kernels.kv_layout import GROUP, element
from stallfree.kernels.simd import (
    fill,
    fma,
    largest,
    load,
    maximum,
    put,
    put_one,
    put_quads,
    total,
)

_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_INFINITY = np.float32(np.inf)
_TINY = np.float32(1e-12)  # the scale of a row of zeros


@compiled
def embed(token, weights, scales, out, at, width):
    """The row of `token` in an int8 table packed as weights, as floats; zeros up to `width`."""
    panel = weights[token // PANEL]
    strip = token % PANEL // STRIP * (width // DEPTH)
    lane = token % STRIP
    scale = scales[token]
    for step in range(width // DEPTH):
        for i in range(DEPTH):
            value = np.float32(panel[((strip + step) * STRIP + lane) * DEPTH + i])
            out[at + step * DEPTH + i] = value * scale


@inlined
def rms_norm(x, at, weight, size, width, epsilon, out, out_at):
    """Root-mean-square norm (arXiv 1910.07467) of `size` floats, padded with zeros to `width`."""
    squares = fill(_ZERO)
    for i in range(0, width, LANES):
        some = load(x, at + i)
        squares = fma(some, some, squares)
    factor = fill(_ONE / np.sqrt(total(squares) / np.float32(size) + epsilon))
    for i in range(0, width, LANES):
        put(out, out_at + i, load(x, at + i) * factor * load(weight, i))


@inlined
def quantize(x, at, width, row, activations, scales, zeros):
    """Round a row of `width` floats to whole numbers at a scale of its own, packed for tiles.

    The numbers reach from the row's least float, or zero, to its largest, or zero; that which
    stands for zero goes to `zeros`. The scale is NaN if one of the floats is no finite number.
    """
    below, above, nothing = span(x, at, width)
    round_row(x, at, width, row, below, above, nothing, activations, scales, zeros)


@inlined
def span(x, at, width):
    """How far `width` floats reach below zero and above it; and zero, or NaN if one is not finite.

    Of floats that are not finite the first two may tell nothing.
    """
    top, bottom, nothing = fill(_ZERO), fill(_ZERO), fill(_ZERO)
    for i in range(0, width, LANES):
        some = load(x, at + i)
        top = maximum(some, top)
        bottom = maximum(fill(_ZERO) - some, bottom)
        nothing = fma(some, fill(_ZERO), nothing)
    return largest(bottom), largest(top), total(nothing)


@inlined
def round_row(x, at, width, row, below, above, nothing, activations, scales, zeros):
    """Round `width` floats, of a row that has the given `span`, as `quantize` does."""
    reach = max(above + below, _TINY) + nothing
    factor = np.float32(LEVELS) / reach
    zero = np.int32(np.rint(below * factor))
    start = (row // ROWS * (width // DEPTH) * ROWS + row % ROWS) * DEPTH
    for i in range(0, width, LANES):
        some = load(x, at + i) * fill(factor)
        put_quads(activations, start + i * ROWS, ROWS * DEPTH, some, zero)
    scales[row] = reach / np.float32(LEVELS)
    zeros[row] = zero


@inlined
def _head_norm(x, at, weight, epsilon):
    squares = _ZERO
    for i in range(weight.size):
        squares += x[at + i] * x[at + i]
    factor = _ONE / np.sqrt(squares / np.float32(weight.size) + epsilon)
    for i in range(weight.size):
        x[at + i] *= factor * weight[i]


@inlined
def _rotate(x, at, angles, half):
    for i in range(half):
        first, second = x[at + i], x[at + half + i]
        cosine, sine = angles[0, i], angles[1, i]
        x[at + i] = first * cosine - second * sine
        x[at + half + i] = second * cosine + first * sine


@inlined
def place_heads(qkv, at, angles, q_norm, k_norm, shape, slot, queries, queries_at, keys, values):
    """Norm and rotate the heads of one token; queries to `queries`, the rest to its KV slot.

    Args:
        qkv: of all heads of the token, from `at`; overwritten.
        angles: (2, D): cosines and sines.
        q_norm, k_norm: (D,), or empty.
        shape: see `shapes.Shape`.
        slot: of the token.
        queries: get the query heads from `queries_at`, scaled.
        keys, values: of the layer, flat, as `kv_layout` says.
    """
    group, lane = slot // GROUP, slot % GROUP
    heads, kv_heads, depth, width = shape.heads, shape.kv_heads, shape.depth, shape.head_width
    for head in range(heads + kv_heads):
        norm = q_norm if head < heads else k_norm
        if norm.size:
            _head_norm(qkv, at + head * depth, norm, shape.epsilon)
        _rotate(qkv, at + head * depth, angles, depth // 2)
    for i in range(heads * depth):
        queries[queries_at + i] = qkv[at + i] * shape.query_scale
    for head in range(kv_heads):
        from_key = at + (heads + head) * depth
        from_value = from_key + kv_heads * depth
        to_key = (group * kv_heads + head) * depth * GROUP
        to_value = (group * kv_heads + head) * GROUP * width
        for i in range(depth):
            put_one(keys, to_key + element(keys, i, lane, GROUP), qkv[from_key + i])
            put_one(values, to_value + element(values, lane, i, width), qkv[from_value + i])
        for i in range(depth, width):
            put_one(values, to_value + element(values, lane, i, width), _ZERO)


@inlined
def merge_splits(first, count, shape, part, part_sums, part_tops, sums, tops, merged, out, at):
    """The attention of one token from what was computed of its splits.

    Args:
        first, count: its splits in `part` (splits, H * padded D), flat, and those beside.
        shape: see `shapes.Shape`.
        sums, tops, merged: scratch, of one number, one number and a head.
        out: gets all heads, from `at`.
    """
    width = shape.head_width
    for head in range(shape.heads):
        sums[0], tops[0] = _ZERO, -_INFINITY
        for i in range(0, width, LANES):
            put(merged, i, fill(_ZERO))
        for split in range(first, first + count):
            place = split * shape.heads + head
            weight, top = part_sums[place], part_tops[place]
            merge(merged, 0, sums, tops, 0, part, place * width, weight, top, width)
        write_head(merged, 0, sums[0], shape.depth, out, at + head * shape.depth)


@inlined
def write_head(x, at, weight_sum, depth, out, out_at):
    """A head's output, divided by the sum of its weights."""
    factor = _ONE / weight_sum
    for i in range(depth):
        out[out_at + i] = x[at + i] * factor

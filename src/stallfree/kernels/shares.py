"""The forward pass of one of several processes that share every layer: tensor parallelism.

A process has some of the heads and of the inner activations: some outputs of the matrices that make
them, some inputs of those that take them. As in `layers.py`, one parallel region runs all phases.
What has to be known of all processes is exchanged between two of them, while the threads wait: a C
function that the region is given reads and writes `Share`.

Results are those of one process, to the last bit. A row is rounded at the scale that all of it has,
so how far it reaches is exchanged first. Sums of products are integers, exact in any order; they
are exchanged before any becomes a float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stallfree.kernels.int8_matmul import (
    DEPTH,
    PANEL,
    ROWS,
    UNIT_GROUPS,
    VECTORS,
    dequantized,
    multiply_tile,
)
from stallfree.kernels.ir import I64, LANES
from stallfree.kernels.jit import compiled, entry
from stallfree.kernels.layers import run_attention
from stallfree.kernels.openmp import barrier, parallel
from stallfree.kernels.phases import (
    add_normed,
    claim,
    done,
    merge_row,
    multiply,
    norm_rows,
    num_groups,
    of_layer,
)
from stallfree.kernels.rows import embed, round_row, span
from stallfree.kernels.shapes import SLICE_ROWS, Team
from stallfree.kernels.simd import fill, load, put

EMBEDDED, RANGES, SUMS = 0, 1, 2  # what is exchanged
_ZERO, _INFINITY = np.float32(0.0), np.float32(np.inf)
_NO_ZERO = np.int32(0)  # it is taken off already


@intrinsic
def _call(typing: Any, address: Any, what: Any, rows: Any) -> Any:
    """Call a C function of two int64."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64, I64])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.none(types.int64, types.int64, types.int64), generate


@compiled
def _exchange(team, what, rows, scratch, share):
    """Between two phases: what all processes have of the first `rows` rows, joined."""
    if team.thread == 0:
        _call(share.exchange, what, rows)
    barrier(scratch.barrier, team.threads)


@compiled
def _embed_share(team, base, table, job, share):
    """Hidden states from token ids; zeros where another process has the token."""
    scratch = job.scratch
    rows, width = job.work.token_ids.size, job.shape.width
    row = claim(base, scratch)
    while row < rows:
        token, at = job.work.token_ids[row] - share.first_token, row * width
        if 0 <= token < share.num_tokens:
            embed(token, table.weights, table.scales, scratch.hidden, at, width)
        else:
            for i in range(0, width, LANES):
                put(scratch.hidden, at + i, fill(_ZERO))
        row = claim(base, scratch)
    return done(team, rows, base, scratch)


@compiled
def _measure(team, base, first, rows, x, stride, merges, job, share):
    """How far rows of `x` from number `first` reach; `merges` their splits before.

    Rows with a float that is not finite reach infinitely far: unlike NaN, that is the largest.
    """
    row = claim(base, job.scratch)
    while row < rows:
        place = (first + row) * stride
        if merges:
            merge_row(team.thread, first + row, place, job)
        below, above, nothing = span(x, place, stride)
        share.ranges[2 * row] = below
        share.ranges[2 * row + 1] = above if nothing == _ZERO else _INFINITY
        row = claim(base, job.scratch)
    return done(team, rows, base, job.scratch)


@compiled
def _round(team, base, first, rows, x, stride, scratch, share):
    """Quantize rows of `x` from number `first`, of which all processes know how far they reach."""
    group = claim(base, scratch)
    while group < num_groups(rows):
        for row in range(group * ROWS, min(rows, (group + 1) * ROWS)):
            below, above = share.ranges[2 * row], share.ranges[2 * row + 1]
            round_row(
                x,
                (first + row) * stride,
                stride,
                row,
                below,
                above,
                above * _ZERO,
                scratch.activations,
                scratch.scales,
                scratch.zeros,
            )
        group = claim(base, scratch)
    return done(team, num_groups(rows), base, scratch)


@compiled
def _multiply_share(team, base, rows, matrix, scratch, share):
    """Sums of products of the quantized rows with the inputs of a matrix that are here."""
    panels, groups = matrix.weights.shape[0], num_groups(rows)
    steps = matrix.weights.shape[1] // (PANEL * DEPTH)
    units = panels * ((groups + UNIT_GROUPS - 1) // UNIT_GROUPS)
    sums = scratch.thread_sums[team.thread]
    unit = claim(base, scratch)
    while unit < units:
        first_group, panel = unit // panels * UNIT_GROUPS, unit % panels
        for group in range(first_group, min(groups, first_group + UNIT_GROUPS)):
            some = min(ROWS, rows - group * ROWS)
            multiply_tile(
                some, scratch.activations, group, matrix.weights, panel, steps, team.threads, sums
            )
            for i in range(some):
                row = group * ROWS + i
                at, zero = (row * panels + panel) * PANEL, scratch.zeros[row]
                for column in range(PANEL):
                    off = zero * matrix.column_sums[panel * PANEL + column]
                    share.sums[at + column] = sums[i * PANEL + column] - off
        unit = claim(base, scratch)
    return done(team, units, base, scratch)


@compiled
def _add_sums(team, base, rows, matrix, norm, at, job, share):
    """Add the sums of all processes, as floats and normed if there is a norm, to hidden states."""
    shape, scratch = job.shape, job.scratch
    panels = matrix.weights.shape[0]
    row = claim(base, scratch)
    while row < rows:
        scale = scratch.scales[row]
        for panel in range(panels):
            for v in range(VECTORS):
                tile, column = row * panels + panel, panel * PANEL
                value = dequantized(share.sums, tile, v, scale, _NO_ZERO, matrix, column)
                place = row * shape.width + column + v * LANES
                if norm.size:
                    put(scratch.wide, place, value)
                else:
                    put(scratch.hidden, at + place, load(scratch.hidden, at + place) + value)
        row = claim(base, scratch)
    base = done(team, rows, base, scratch)
    if norm.size:
        wide, hidden = scratch.wide, scratch.hidden
        base = add_normed(team, base, rows, wide, norm, hidden, at, shape, scratch)
    return base


@compiled
def _take(team, base, first, rows, x, stride, merges, matrix, norm, at, job, share):
    """Multiply rows of which each process has some inputs, and add that to the hidden states."""
    scratch = job.scratch
    base = _measure(team, base, first, rows, x, stride, merges, job, share)
    _exchange(team, RANGES, rows, scratch, share)
    base = _round(team, base, first, rows, x, stride, scratch, share)
    base = _multiply_share(team, base, rows, matrix, scratch, share)
    _exchange(team, SUMS, rows, scratch, share)
    return _add_sums(team, base, rows, matrix, norm, at, job, share)


@compiled
def _run_layer(team, base, layer, layers, job, share):
    """See `layers.py`."""
    shape, scratch = job.shape, job.scratch
    all_rows, width = job.work.token_ids.size, shape.width
    attended_width = layers.output.weights.shape[2] // PANEL
    inner_width = layers.down.weights.shape[2] // PANEL
    hidden, wide, attended = scratch.hidden, scratch.wide, scratch.attended
    output, gate_up = of_layer(layers.output, layer), of_layer(layers.gate_up, layer)
    down, norm = of_layer(layers.down, layer), layers.mlp_norm[layer]
    post, mlp_post = layers.post_attention_norm[layer], layers.post_mlp_norm[layer]
    base = run_attention(team, base, layer, layers, job)
    for first in range(0, all_rows, SLICE_ROWS):
        rows, at = min(SLICE_ROWS, all_rows - first), first * width
        base = _take(
            team, base, first, rows, attended, attended_width, True, output, post, at, job, share
        )
        base = norm_rows(team, base, rows, hidden, at, norm, shape, scratch)
        base = multiply(team, base, rows, gate_up, shape.gate, wide, 0, inner_width, scratch)
        base = _take(team, base, 0, rows, wide, inner_width, False, down, mlp_post, at, job, share)
    return base


@compiled
def _run(thread, threads, table, layers, job, share):
    team, base = Team(thread, threads), 0
    if table.scales.size:
        base = _embed_share(team, base, table, job, share)
        _exchange(team, EMBEDDED, job.work.token_ids.size, job.scratch, share)
    for layer in range(layers.windows.size):
        base = _run_layer(team, base, layer, layers, job, share)


@entry
def run(threads, table, layers, job, share):
    """All layers, as `layers.run` does.

    Args:
        threads: that share the work.
        table, layers, job: of this process.
        share: `Share`.
    """
    job.scratch.counter[0] = 0
    parallel(_run, threads, (table, layers, job, share))

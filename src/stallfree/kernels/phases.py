"""The phases of a forward pass in int8: what is done to all rows before any goes on.

All threads run a phase together and share its units of work by claiming the next one, so that a
thread that another process holds up does less of them. A phase is given where the counter of units
was when it began, and gives where it is after its barrier.
"""

from __future__ import annotations

import numpy as np

from stallfree.kernels.attention import SPLIT, attend_split, merge
from stallfree.kernels.attention_tiles import ROWS as QUERY_ROWS
from stallfree.kernels.int8_matmul import (
    DEPTH,
    PANEL,
    ROWS,
    UNIT_GROUPS,
    VECTORS,
    dequantized,
    multiply_tile,
)
from stallfree.kernels.ir import LANES
from stallfree.kernels.jit import compiled, inlined
from stallfree.kernels.kv_layout import element
from stallfree.kernels.openmp import barrier, fetch_add
from stallfree.kernels.rows import (
    embed,
    merge_splits,
    place_heads,
    quantize,
    rms_norm,
    write_head,
)
from stallfree.kernels.shapes import Product
from stallfree.kernels.simd import exp2, fill, load, put, put_one, put_words, total

STORE, ADD, GATE_SILU, GATE_GELU = 0, 1, 2, 3  # what becomes of a product
_MINUS_LOG2_E = np.float32(-1.4426950408889634)
_GELU_SLOPE = np.float32(-1.4426950408889634 * 1.5957691216057308)  # -log2(e) * 2 * sqrt(2 / pi)
_GELU_CUBE = np.float32(0.044715)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_INFINITY = np.float32(np.inf)


@inlined
def claim(base, scratch):
    """The next unit of a phase; the counter was at `base` when the phase began."""
    return fetch_add(scratch.counter, 0, 1) - base


@inlined
def done(team, units, base, scratch):
    """End a phase. Each thread has claimed once in vain, so the counter is now at the result."""
    barrier(scratch.barrier, team.threads)
    return base + units + team.threads


@inlined
def num_groups(rows):
    """Of activations, which rows make up."""
    return (rows + ROWS - 1) // ROWS


@compiled
def embed_tokens(team, base, table, job):
    """Hidden states from token ids."""
    scratch = job.scratch
    rows, width = job.work.token_ids.size, job.shape.width
    row = claim(base, scratch)
    while row < rows:
        token = job.work.token_ids[row]
        embed(token, table.weights, table.scales, scratch.hidden, row * width, width)
        row = claim(base, scratch)
    return done(team, rows, base, scratch)


@compiled
def norm_rows(team, base, rows, x, at, weight, shape, scratch):
    """Norm rows of `x` from `at`, and quantize them."""
    normed = scratch.thread_row[team.thread]
    width = shape.width
    group = claim(base, scratch)
    while group < num_groups(rows):
        for row in range(group * ROWS, min(rows, (group + 1) * ROWS)):
            rms_norm(x, at + row * width, weight, shape.hidden, width, shape.epsilon, normed, 0)
            quantize(normed, 0, width, row, scratch.activations, scratch.scales, scratch.zeros)
        group = claim(base, scratch)
    return done(team, num_groups(rows), base, scratch)


@compiled
def add_normed(team, base, rows, x, weight, out, at, shape, scratch):
    """Norm rows of `x`, and add them to rows of `out` from `at`."""
    normed = scratch.thread_row[team.thread]
    width = shape.width
    row = claim(base, scratch)
    while row < rows:
        rms_norm(x, row * width, weight, shape.hidden, width, shape.epsilon, normed, 0)
        for i in range(0, width, LANES):
            place = at + row * width + i
            put(out, place, load(out, place) + load(normed, i))
        row = claim(base, scratch)
    return done(team, rows, base, scratch)


@compiled
def quantize_rows(team, base, rows, x, width, scratch):
    """Quantize rows of `x`."""
    group = claim(base, scratch)
    while group < num_groups(rows):
        for row in range(group * ROWS, min(rows, (group + 1) * ROWS)):
            quantize(x, row * width, width, row, scratch.activations, scratch.scales, scratch.zeros)
        group = claim(base, scratch)
    return done(team, num_groups(rows), base, scratch)


@compiled
def multiply(team, base, rows, matrix, kind, out, at, stride, scratch):
    """A product of the quantized rows with a matrix; row r goes to `out` at `at` + r * `stride`."""
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
                scale, zero = scratch.scales[row], scratch.zeros[row]
                _finish(sums, i, scale, zero, matrix, panel, kind, out, at + row * stride)
        unit = claim(base, scratch)
    return done(team, units, base, scratch)


@inlined
def _finish(sums, row, scale, zero, matrix, panel, kind, out, at):
    """Turn one row of a tile into floats, and put them where they belong."""
    column = panel * PANEL
    if kind >= GATE_SILU:
        half = VECTORS // 2
        for v in range(half):
            gate = dequantized(sums, row, v, scale, zero, matrix, column)
            up = dequantized(sums, row, v + half, scale, zero, matrix, column)
            exponent = gate * fill(_MINUS_LOG2_E)
            if kind == GATE_GELU:  # by tanh: 1 + tanh(x) is 2 * sigmoid(2 * x)
                cubic = fill(_ONE) + gate * gate * fill(_GELU_CUBE)
                exponent = gate * fill(_GELU_SLOPE) * cubic
            sigmoid = fill(_ONE) / (fill(_ONE) + exp2(exponent))
            put(out, at + column // 2 + v * LANES, gate * sigmoid * up)
        return
    for v in range(VECTORS):
        value = dequantized(sums, row, v, scale, zero, matrix, column)
        place = at + column + v * LANES
        if kind == ADD:
            value = load(out, place) + value
        put(out, place, value)


@inlined
def of_layer(product, layer):
    """The matrix of one layer."""
    return Product(
        product.weights[layer],
        product.scales[layer],
        product.column_sums[layer],
        product.bias[layer],
    )


@compiled
def place_all(team, base, first, rows, layers, layer, stride, job):
    """Rotate queries and keys; keys and values into the cache."""
    shape = job.shape
    work = job.work
    scratch = job.scratch
    keys = job.cache.keys[layer]
    values = job.cache.values[layer]
    row = claim(base, scratch)
    while row < rows:
        place_heads(
            scratch.wide,
            row * stride,
            work.angles[layers.ropes[layer], first + row],
            layers.q_norm[layer],
            layers.k_norm[layer],
            shape,
            work.slots[first + row],
            scratch.queries,
            (first + row) * shape.heads * shape.depth,
            keys,
            values,
        )
        row = claim(base, scratch)
    return done(team, rows, base, scratch)


@compiled
def attend(team, base, layer, window, stride, job):
    """Attention of all rows, by items and key heads."""
    units = job.work.items.shape[0] * job.shape.kv_heads
    unit = claim(base, job.scratch)
    while unit < units:
        item, head = unit // job.shape.kv_heads, unit % job.shape.kv_heads
        _attend_item(team.thread, layer, job.work.items[item], head, window, stride, job)
        unit = claim(base, job.scratch)
    return done(team, units, base, job.scratch)


@compiled
def _attend_item(thread, layer, item, head, window, stride, job):
    """Attention of some tokens' rows for one key head."""
    shape, scratch = job.shape, job.scratch
    chunk, first_row, position, tokens, split, part = item
    depth, heads, width = shape.depth, shape.heads, shape.head_width
    group = heads // shape.kv_heads
    rows = tokens * group
    queries, out = scratch.thread_queries[thread], scratch.thread_out[thread]
    merged, stats = scratch.thread_total[thread], scratch.thread_stats[thread]
    tops, all_sums, all_tops, shrink = stats[0], stats[1], stats[2], stats[3]
    sums = scratch.thread_weight_sums[thread]
    for row in range(rows):
        at_head = head * group + row % group
        start = ((first_row + row // group) * heads + at_head) * depth
        packed = row // QUERY_ROWS * depth * QUERY_ROWS
        whole = depth // LANES * LANES
        for i in range(0, whole, LANES):
            place = packed + element(queries, i, row % QUERY_ROWS, QUERY_ROWS)
            put_words(queries, place, QUERY_ROWS, load(scratch.queries, start + i))
        for i in range(whole, depth):
            place = packed + element(queries, i, row % QUERY_ROWS, QUERY_ROWS)
            put_one(queries, place, scratch.queries[start + i])
        all_sums[row], all_tops[row] = _ZERO, -_INFINITY
        for i in range(0, width, LANES):
            put(merged, row * width + i, fill(_ZERO))
    low, high = split, split + 1
    if split < 0:
        low, high = 0, (position + tokens - 1) // SPLIT + 1
    for each in range(low, high):
        attend_split(
            rows,
            group,
            position,
            each,
            window,
            queries,
            job.cache.keys[layer],
            job.cache.values[layer],
            job.work.groups[chunk],
            shape.kv_heads,
            head,
            depth,
            width,
            out,
            sums,
            tops,
            scratch.thread_scores[thread],
            scratch.thread_weights[thread],
            shrink,
            scratch.thread_places[thread],
        )
        if split < 0:
            for row in range(rows):
                weight = total(load(sums, row * LANES))
                merge(
                    merged,
                    row * width,
                    all_sums,
                    all_tops,
                    row,
                    out,
                    row * width,
                    weight,
                    tops[row],
                    width,
                )
    for row in range(rows):
        at_head = head * group + row % group
        if split < 0:
            place = (first_row + row // group) * stride + at_head * depth
            write_head(merged, row * width, all_sums[row], depth, scratch.attended, place)
        else:
            place = part * heads + at_head
            scratch.part_sums[place] = total(load(sums, row * LANES))
            scratch.part_tops[place] = tops[row]
            for i in range(0, width, LANES):
                put(scratch.part, place * width + i, load(out, row * width + i))


@inlined
def merge_row(thread, row, place, job):
    """Merge the splits of a row that has several; its heads are at `place` then, as all others."""
    scratch = job.scratch
    part, count = job.work.parts[row]
    if count:
        merge_splits(
            part,
            count,
            job.shape,
            scratch.part,
            scratch.part_sums,
            scratch.part_tops,
            scratch.thread_stats[thread, 0],
            scratch.thread_stats[thread, 1],
            scratch.thread_out[thread],
            scratch.attended,
            place,
        )


@compiled
def quantize_attended(team, base, first, rows, stride, job):
    """Merge the splits of rows that have several, and quantize all."""
    scratch = job.scratch
    group = claim(base, scratch)
    while group < num_groups(rows):
        for row in range(group * ROWS, min(rows, (group + 1) * ROWS)):
            place = (first + row) * stride
            merge_row(team.thread, first + row, place, job)
            quantize(
                scratch.attended,
                place,
                stride,
                row,
                scratch.activations,
                scratch.scales,
                scratch.zeros,
            )
        group = claim(base, scratch)
    return done(team, num_groups(rows), base, scratch)

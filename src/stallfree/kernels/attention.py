"""Causal attention over a paged cache, for decodes and chunks of prompts alike.

The query heads that share a key head are rows, and so are the tokens of a chunk: row f is token
f // G with head f % G of its group of G. ROWS rows are run at a time (what registers hold), keys
128 at a time (a *stretch*), with a running softmax ("flash attention", arXiv 2205.14135): keys and
values of a stretch come from memory once for all rows of an item. Long contexts are cut into
*splits* of 1,024 keys whose results are merged in order ("flash decoding"), so that several threads
can share one request.

A row's arithmetic depends on its own position alone: stretches and splits begin at fixed positions,
and a key that it must not see adds exactly nothing, as long as values are finite. So it has the
same result in any batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from stallfree.kernels.attention_tiles import LATER, ROWS, STRETCH, STRETCH_GROUPS, score, weigh
from stallfree.kernels.ir import I64, LANES, Loop, data_of, load, offset, prefetch
from stallfree.kernels.jit import compiled, inlined
from stallfree.kernels.kv_layout import GROUP
from stallfree.kernels.simd import (
    exp2,
    fill,
    fma,
    keep_lanes,
    largest,
    maximum,
    put,
)
from stallfree.kernels.simd import (
    load as load_vector,
)

SPLIT = 1024
ITEM_ROWS = 16 * ROWS  # of an item at most
_MAX_PARTS = 4  # that asking for the next stretch is spread over
CACHE_LINE = 64  # bytes

_INFINITY = np.float32(np.inf)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


@intrinsic
def _fetch(
    typing: Any, keys: Any, values_: Any, places: Any, key_elements: Any, value_elements: Any
) -> Any:
    """Ask for the keys and values at the later `places`."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        table = data_of(context, builder, places, values[2])
        for side, array in enumerate((keys, values_)):
            base = data_of(context, builder, array, values[side])
            line = CACHE_LINE // (array.dtype.bitwidth // 8)
            lines = builder.udiv(values[3 + side], I64(line))
            for i in range(STRETCH_GROUPS):
                index = LATER + side * STRETCH_GROUPS + i
                start = load(builder, offset(builder, table, index), I64, align=8)
                loop = Loop(builder, lines, [])
                place = builder.add(start, builder.mul(loop.index, I64(line)))
                prefetch(builder, offset(builder, base, place))
                loop.close([])
        return context.get_dummy_value()

    return types.none(keys, values_, places, types.intp, types.intp), generate


@inlined
def _top(scores, at, low, high, vectors):
    """The largest of a row's scores of keys `low` to `high`."""
    top = fill(-_INFINITY)
    if low <= 0 and high >= vectors * LANES:
        for v in range(vectors):
            top = maximum(load_vector(scores, at + v * LANES), top)
    else:
        for v in range(vectors):
            seen = load_vector(scores, at + v * LANES)
            seen = keep_lanes(seen, low - v * LANES, high - v * LANES, -_INFINITY)
            top = maximum(seen, top)
    return largest(top)


@inlined
def _to_weights(scores, at, low, high, vectors, top, weights):
    """A row's weights from its scores, zero outside keys `low` to `high`; gives their sums.

    A sum is NaN if a score is no finite number.
    """
    shift, sums = fill(top), fill(_ZERO)
    if low <= 0 and high >= vectors * LANES:
        for v in range(vectors):
            one = load_vector(scores, at + v * LANES)
            weight = exp2(one - shift)
            put(weights, at + v * LANES, weight)
            sums = fma(one, fill(_ZERO), sums + weight)
    else:
        for v in range(vectors):
            one = load_vector(scores, at + v * LANES)
            weight = exp2(one - shift)
            weight = keep_lanes(weight, low - v * LANES, high - v * LANES, _ZERO)
            one = keep_lanes(one, low - v * LANES, high - v * LANES, _ZERO)
            put(weights, at + v * LANES, weight)
            sums = fma(one, fill(_ZERO), sums + weight)
    return sums


@inlined
def _power(exponent):
    return largest(exp2(fill(exponent)))


@inlined
def merge(into, at, sums, tops, row, part, part_at, part_sum, part_top, width):
    """Add a split's unscaled output, sum of weights and top score to those of the splits before."""
    top = max(tops[row], part_top)
    keep, take = _power(tops[row] - top), _power(part_top - top)
    if part_sum == _ZERO:
        keep, take = _ONE, _ZERO
    for column in range(0, width, LANES):
        added = load_vector(part, part_at + column) * fill(take)
        put(into, at + column, fma(load_vector(into, at + column), fill(keep), added))
    sums[row] = sums[row] * keep + part_sum * take
    tops[row] = top


@inlined
def _locate(key, end, groups, heads, head, depth, width, places):
    """Where keys and values of the stretch at `key` are: into the later `places`."""
    last = (end - 1) // GROUP
    for i in range(STRETCH_GROUPS):
        place = groups[min(key // GROUP + i, last)] * heads + head
        places[LATER + i] = place * depth * GROUP
        places[LATER + STRETCH_GROUPS + i] = place * GROUP * width


@compiled
def attend_split(
    rows,
    group_size,
    first_position,
    split,
    window,
    queries,
    keys,
    values,
    groups,
    heads,
    head,
    depth,
    width,
    out,
    sums,
    tops,
    scores,
    weights,
    shrink,
    places,
):
    """Attention of an item's rows to one split of their context.

    Args:
        rows: of the item; row f is the token at `first_position` + f // `group_size`.
        queries: matrices [rows / ROWS] of D rows and ROWS columns (see `kv_layout`), scaled by
            log2(e) / sqrt(D).
        keys, values: of the layer, flat.
        groups: where each 16 tokens of the request are, in groups.
        out: (rows, width), unscaled; `sums` (rows, 16), of weights, and `tops` (rows,), of scores.
        scores, weights, shrink, places: scratch of the thread; weights have the queries' type.
    """
    for row in range(rows):
        put(sums, row * LANES, fill(_ZERO))
        tops[row] = -_INFINITY
        for column in range(0, width, LANES):
            put(out, row * width + column, fill(_ZERO))
    last = first_position + (rows - 1) // group_size
    begin, end = split * SPLIT, min(last + 1, (split + 1) * SPLIT)
    if window > 0:
        begin = max(begin, (first_position - window + 1) // STRETCH * STRETCH)
    if begin < end:
        _locate(begin, end, groups, heads, head, depth, width, places)
        _fetch(keys, values, places, depth * GROUP, GROUP * width)
    for key in range(begin, end, STRETCH):
        for i in range(LATER):
            places[i] = places[LATER + i]
        if key + STRETCH < end:
            _locate(key + STRETCH, end, groups, heads, head, depth, width, places)
        count = min(STRETCH, end - key)
        vectors = (count + LANES - 1) // LANES
        parts = min(_MAX_PARTS, (rows + ROWS - 1) // ROWS)
        for start in range(0, rows, ROWS):
            some = min(ROWS, rows - start)
            part = min(start // ROWS, parts - 1)
            newest = first_position + (start + some - 1) // group_size
            if newest < key:
                continue
            score(some, queries, start * depth, keys, places, depth, scores, part, parts)
            for row in range(some):
                position = first_position + (start + row) // group_size
                low = position - window + 1 - key if window > 0 else 0
                top = _top(scores, row * STRETCH, low, position + 1 - key, vectors)
                shrink[LANES + row] = max(tops[start + row], top)
            put(shrink, 0, exp2(load_vector(tops, start) - load_vector(shrink, LANES)))
            for row in range(some):
                position = first_position + (start + row) // group_size
                low = position - window + 1 - key if window > 0 else 0
                top = shrink[LANES + row]
                tops[start + row] = top
                added = _to_weights(
                    scores, row * STRETCH, low, position + 1 - key, vectors, top, weights
                )
                place = (start + row) * LANES
                put(sums, place, fma(load_vector(sums, place), fill(shrink[row]), added))
            seen = min(count, newest + 1 - key)
            at = start * width
            weigh(some, weights, shrink, values, places, seen, width, out, at, part, parts)

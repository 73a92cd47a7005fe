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

Keys and values lie in groups of 16 tokens: keys [groups][K][D][16], so that 16 keys are a vector,
values [groups][K][16][padded D].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from stallfree.kernels.ir import (
    F32,
    F32X16,
    I64,
    LANES,
    Loop,
    call,
    data_of,
    load,
    load_floats,
    offset,
    prefetch,
    splat,
    store,
)
from stallfree.kernels.jit import compiled, inlined
from stallfree.kernels.processor import HAS_AVX512
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

GROUP = LANES  # tokens whose keys and values lie together
STRETCH_GROUPS = 8
STRETCH = STRETCH_GROUPS * GROUP
SPLIT = 1024
ROWS = 7 if HAS_AVX512 else 4
ITEM_ROWS = 16 * ROWS  # of an item at most
_VECTORS = 4 if HAS_AVX512 else 1  # in registers for each row
_MAX_PARTS = 4  # that asking for the next stretch is spread over
CACHE_LINE = 64  # bytes
LATER = 2 * STRETCH_GROUPS  # where the places of the next stretch are, after those of this

_INFINITY = np.float32(np.inf)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)


def _make_score(rows: int) -> Any:
    """A function of `rows` queries and the keys of a stretch."""

    @intrinsic
    def score(
        typing: Any,
        queries: Any,
        at: Any,
        keys: Any,
        places: Any,
        depth: Any,
        scores: Any,
        later_at: Any,
        later_step: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            q = offset(builder, data_of(context, builder, queries, values[0]), values[1])
            base = data_of(context, builder, keys, values[2])
            table = data_of(context, builder, places, values[3])
            out = data_of(context, builder, scores, values[5])
            groups, later = (
                [
                    offset(builder, base, load(builder, offset(builder, table, i), I64, align=8))
                    for i in range(first, first + STRETCH_GROUPS)
                ]
                for first in (0, LATER)
            )
            for first in range(0, STRETCH_GROUPS, _VECTORS):
                some = groups[first : first + _VECTORS]
                zero = ir.Constant(F32X16, None)
                loop = Loop(builder, values[4], [zero] * (rows * len(some)))
                row_at = offset(builder, q, builder.mul(loop.index, I64(ROWS)))
                key_at = builder.mul(loop.index, I64(GROUP))
                columns = [load_floats(builder, offset(builder, k, key_at)) for k in some]
                fetch_at = builder.add(values[6], builder.mul(loop.index, values[7]))
                for k in later[first : first + _VECTORS]:
                    prefetch(builder, offset(builder, k, fetch_at))
                made = []
                for row in range(rows):
                    one = splat(builder, load(builder, offset(builder, row_at, row), F32))
                    for v, column in enumerate(columns):
                        before = loop.values[row * len(some) + v]
                        made.append(call(builder, "llvm.fma.v16f32", F32X16, one, column, before))
                for index, value in enumerate(loop.close(made)):
                    row, v = divmod(index, len(some))
                    store(builder, value, offset(builder, out, row * STRETCH + (first + v) * GROUP))
            return context.get_dummy_value()

        signature = types.none(
            queries, types.intp, keys, places, types.intp, scores, types.intp, types.intp
        )
        return signature, generate

    return score


def _make_weigh(rows: int, vectors: int) -> Any:
    """A function that adds the values of a stretch to `rows` rows of outputs, weighted."""

    @intrinsic
    def weigh(
        typing: Any,
        weights: Any,
        shrink: Any,
        values_: Any,
        places: Any,
        keys: Any,
        width: Any,
        column: Any,
        out: Any,
        at: Any,
        later_at: Any,
        later_step: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            p, factors, base, table = (
                data_of(context, builder, signature.args[i], values[i]) for i in range(4)
            )
            table = offset(builder, table, STRETCH_GROUPS)  # the values' places
            result = offset(builder, data_of(context, builder, out, values[7]), values[8])
            count, stride, first = values[4], values[5], values[6]
            result = offset(builder, result, first)
            rows_at = [
                offset(builder, result, builder.mul(stride, I64(row))) for row in range(rows)
            ]
            initial = []
            for row in range(rows):
                factor = splat(builder, load(builder, offset(builder, factors, row), F32))
                for v in range(vectors):
                    old = load(builder, offset(builder, rows_at[row], v * LANES), F32X16)
                    initial.append(builder.fmul(old, factor))
            whole = builder.lshr(builder.add(count, I64(GROUP - 1)), I64(4))
            groups = Loop(builder, whole, initial)
            start, later = (
                load(builder, offset(builder, table, at), I64, align=8)
                for at in (groups.index, builder.add(groups.index, I64(LATER)))
            )
            first_token = builder.shl(groups.index, I64(4))
            left = builder.sub(count, first_token)
            is_last = builder.icmp_signed("<", left, I64(GROUP))
            tokens = Loop(builder, builder.select(is_last, left, I64(GROUP)), groups.values)
            column_at = builder.add(builder.mul(tokens.index, stride), first)
            data = offset(builder, base, builder.add(start, column_at))
            columns = [
                load_floats(builder, offset(builder, data, v * LANES)) for v in range(vectors)
            ]
            fetch_at = builder.add(values[9], builder.mul(tokens.index, values[10]))
            ahead = offset(builder, base, builder.add(later, fetch_at))
            for v in range(0, vectors, 2):
                prefetch(builder, offset(builder, ahead, v * LANES))
            weight_at = builder.add(first_token, tokens.index)
            made = []
            for row in range(rows):
                place = offset(builder, p, builder.add(weight_at, I64(row * STRETCH)))
                one = splat(builder, load(builder, place, F32))
                for v, loaded in enumerate(columns):
                    before = tokens.values[row * vectors + v]
                    made.append(call(builder, "llvm.fma.v16f32", F32X16, one, loaded, before))
            for index, value in enumerate(groups.close(tokens.close(made))):
                row, v = divmod(index, vectors)
                store(builder, value, offset(builder, rows_at[row], v * LANES))
            return context.get_dummy_value()

        numbers = (types.intp,) * 3
        signature = types.none(
            weights, shrink, values_, places, *numbers, out, types.intp, types.intp, types.intp
        )
        return signature, generate

    return weigh


_score1, _score2, _score4, _score_most = (_make_score(rows) for rows in (1, 2, 4, ROWS))
_weigh1, _weigh2, _weigh4, _weigh_most = (_make_weigh(rows, _VECTORS) for rows in (1, 2, 4, ROWS))
_narrow1, _narrow2, _narrow4, _narrow_most = (_make_weigh(rows, 1) for rows in (1, 2, 4, ROWS))


@compiled
def _score(rows, queries, at, keys, places, depth, scores, part, parts):
    """Scores of `rows` queries; asks for part `part` of `parts` of the next stretch's keys."""
    step = GROUP // parts
    later = part * step * depth
    if rows > 4:
        _score_most(queries, at, keys, places, depth, scores, later, step)
    elif rows > 2:
        _score4(queries, at, keys, places, depth, scores, later, step)
    elif rows > 1:
        _score2(queries, at, keys, places, depth, scores, later, step)
    else:
        _score1(queries, at, keys, places, depth, scores, later, step)


@compiled
def _weigh(rows, weights, shrink, values, places, count, width, out, at, part, parts):
    """Add weighted values; asks for part `part` of `parts` of the next stretch's values."""
    turns = width // (_VECTORS * LANES) + width % (_VECTORS * LANES) // LANES
    step = width // (parts * turns)
    later = part * turns * step * GROUP
    column = 0
    while column + _VECTORS * LANES <= width:
        if rows > 4:
            _weigh_most(weights, shrink, values, places, count, width, column, out, at, later, step)
        elif rows > 2:
            _weigh4(weights, shrink, values, places, count, width, column, out, at, later, step)
        elif rows > 1:
            _weigh2(weights, shrink, values, places, count, width, column, out, at, later, step)
        else:
            _weigh1(weights, shrink, values, places, count, width, column, out, at, later, step)
        column += _VECTORS * LANES
        later += step * GROUP
    while column < width:
        if rows > 4:
            _narrow_most(
                weights, shrink, values, places, count, width, column, out, at, later, step
            )
        elif rows > 2:
            _narrow4(weights, shrink, values, places, count, width, column, out, at, later, step)
        elif rows > 1:
            _narrow2(weights, shrink, values, places, count, width, column, out, at, later, step)
        else:
            _narrow1(weights, shrink, values, places, count, width, column, out, at, later, step)
        column += LANES
        later += step * GROUP


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
            top = maximum(top, load_vector(scores, at + v * LANES))
    else:
        for v in range(vectors):
            seen = load_vector(scores, at + v * LANES)
            top = maximum(top, keep_lanes(seen, low - v * LANES, high - v * LANES, -_INFINITY))
    return largest(top)


@inlined
def _to_weights(scores, at, low, high, vectors, top):
    """Turn a row's scores into weights, zero outside keys `low` to `high`; gives their sums.

    A sum is NaN if a score is no finite number.
    """
    shift, sums = fill(top), fill(_ZERO)
    if low <= 0 and high >= vectors * LANES:
        for v in range(vectors):
            score = load_vector(scores, at + v * LANES)
            weight = exp2(score - shift)
            put(scores, at + v * LANES, weight)
            sums = fma(score, fill(_ZERO), sums + weight)
    else:
        for v in range(vectors):
            score = load_vector(scores, at + v * LANES)
            weight = exp2(score - shift)
            weight = keep_lanes(weight, low - v * LANES, high - v * LANES, _ZERO)
            score = keep_lanes(score, low - v * LANES, high - v * LANES, _ZERO)
            put(scores, at + v * LANES, weight)
            sums = fma(score, fill(_ZERO), sums + weight)
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
    shrink,
    places,
):
    """Attention of an item's rows to one split of their context.

    Args:
        rows: of the item; row f is the token at `first_position` + f // `group_size`.
        queries: packed [rows / ROWS][depth][ROWS], scaled by log2(e) / sqrt(depth).
        keys, values: of the layer, flat.
        groups: where each 16 tokens of the request are, in groups.
        out: (rows, width), unscaled; `sums` (rows, 16), of weights, and `tops` (rows,), of scores.
        scores, shrink, places: scratch of the thread.
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
            _score(some, queries, start * depth, keys, places, depth, scores, part, parts)
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
                added = _to_weights(scores, row * STRETCH, low, position + 1 - key, vectors, top)
                place = (start + row) * LANES
                put(sums, place, fma(load_vector(sums, place), fill(shrink[row]), added))
            seen = min(count, newest + 1 - key)
            _weigh(
                some, scores, shrink, values, places, seen, width, out, start * width, part, parts
            )
